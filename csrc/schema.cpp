// The operators this library gives torch, and the contract of each. Backends register their kernels beside their code
// (csrc/cpu, csrc/cuda); mg_ops/library.py registers the fakes and compares its signature with this one.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mg_ops, m) {
  // Mutual matching of a batch. Sizes: B images, A anchors, C classes, N objects in all.
  //
  //   anchors     (A, 4) floating      boxes (x1, y1, x2, y2), in the one unit that all boxes share
  //   pred_boxes  (B, A, 4) floating   regressed boxes; with `box_coder` the regression deltas (dx, dy, dw, dh) instead
  //   cls_scores  (B, A, C) floating   logits, or probabilities with `scores_are_probabilities`
  //   gt_boxes    (N, 4) floating      objects of all images, one image after the other
  //   gt_labels   (N,) int64 or int32  a label outside [0, C) has probability 0
  //   gt_offsets  (B + 1,) int64/int32 image b has the objects gt_offsets[b] to gt_offsets[b + 1]; those past the last
  //                                    offset do not count. Wrong offsets raise on the CPU and are clamped on a GPU
  //   gt_crowd    (N,) bool or None    regions to ignore
  //   box_coder   float[5] or None     what decodes pred_boxes: the weights of x, y, w and h, and the clip
  //   classification_by_regressed, localization_by_amplified   the quality that ranks each task, else the anchors' IoU
  //
  // Floating is float16, bfloat16, float32 or float64, each argument its own, any strides; arithmetic is in float32.
  // Returns, all on the anchors' device and contiguous:
  //
  //   cls_match   (B, A) int64   index of the object within its image, -1 background, -2 ignored
  //   loc_match   (B, A) int64   index of the object within its image, -1 none
  //   num_pos     (N,) int32     positives each object asks for; 0 for one that cannot be matched or does not count
  //   num_total   (N,) int32     positives and ignored anchors each object asks for; likewise
  //
  // Nothing is differentiated. Wrong shapes, dtypes, devices and numbers raise RuntimeError (csrc/check.h),
  // from the operators written in Python TypeError or ValueError.
  m.def(
      "mutual_match(Tensor anchors, Tensor pred_boxes, Tensor cls_scores, "
      "Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets, Tensor? gt_crowd, "
      "float[]? box_coder, bool scores_are_probabilities, "
      "bool classification_by_regressed, bool localization_by_amplified, "
      "float sigma, float iou_positive, float iou_ignored, float crowd_overlap) "
      "-> (Tensor, Tensor, Tensor, Tensor)");

  // The classification loss of a batch (csrc/class_loss.h has the formula), added up over all but the ignored anchors.
  //
  //   cls_logits     (B, A, C) floating
  //   class_targets  (B, A) int64        a label in [0, C), or -1 for background; any other number: ignored
  //   soft_targets   (B, A) floating     the target at the label, 1 without them; with 0 the anchor is background
  //
  // Returns a float32 number, equal from run to run. Its derivative with respect to the logits is class_loss_backward,
  // in their dtype and contiguous; mg_ops/losses.py registers it. The targets get none.
  m.def(
      "class_loss(Tensor cls_logits, Tensor class_targets, Tensor? soft_targets, float positive_weight, "
      "float positive_gamma, float negative_weight, float negative_gamma, bool weigh_by_target) -> Tensor");
  m.def(
      "class_loss_backward(Tensor grad_output, Tensor cls_logits, Tensor class_targets, Tensor? soft_targets, "
      "float positive_weight, float positive_gamma, float negative_weight, float negative_gamma, "
      "bool weigh_by_target) -> Tensor");

  // The box loss of a batch (csrc/box_loss.h has the formulas), added up over the positives and, for L1 losses, the
  // four coordinates.
  //
  //   predictions  (B, A, 4) floating      boxes (x1, y1, x2, y2); with `box_coder` the regression deltas instead
  //   anchors      (A, 4) floating
  //   match        (B, A) int64            the object of a positive within its image; any other number: no positive
  //   gt_boxes, gt_offsets                 as of mutual_match; wrong offsets raise on the CPU, are clamped on a GPU
  //   weights      (B, A) floating         of the positives, 1 without them
  //   loss         0 smooth L1 (beta), 1 balanced L1 (alpha, gamma, beta), 2 the same as released with the paper,
  //                all on deltas where there is a box coder; 3 GIoU, 4 CIoU, on boxes
  //
  // Returns a float32 number, equal from run to run. Its derivative with respect to the predictions is
  // box_loss_backward, in their dtype and contiguous; mg_ops/losses.py registers it. Nothing else gets one.
  m.def(
      "box_loss(Tensor predictions, Tensor anchors, Tensor match, Tensor gt_boxes, Tensor gt_offsets, "
      "Tensor? weights, float[]? box_coder, int loss, float alpha, float gamma, float beta) -> Tensor");
  m.def(
      "box_loss_backward(Tensor grad_output, Tensor predictions, Tensor anchors, Tensor match, Tensor gt_boxes, "
      "Tensor gt_offsets, Tensor? weights, float[]? box_coder, int loss, float alpha, float gamma, float beta) "
      "-> Tensor");

  // The distribution focal loss of a batch (csrc/box_loss.h), added up over the positives and their four sides.
  //
  //   predictions  (B, A, 4 * bins) floating   the logits of the distances to the left, top, right and bottom side
  //   strides      (A,) floating               how long a bin is
  //   margin                                   distances are clamped to bins - 1 - margin
  //
  // All else is as of box_loss.
  m.def(
      "distribution_loss(Tensor predictions, Tensor anchors, Tensor match, Tensor gt_boxes, Tensor gt_offsets, "
      "Tensor? weights, Tensor strides, float margin) -> Tensor");
  m.def(
      "distribution_loss_backward(Tensor grad_output, Tensor predictions, Tensor anchors, Tensor match, "
      "Tensor gt_boxes, Tensor gt_offsets, Tensor? weights, Tensor strides, float margin) -> Tensor");

  // The other rules (docs/definition/rules.md) take the same inputs, whether they read them or not, and then options of
  // their own. They return cls_match as above, and num_pos (N,) int32: how many anchors have each object there.
  //
  // Max-IoU matching reads no predictions. low_quality: 0 none, 1 keep_owner, 2 take_all, 3 take_first.
  m.def(
      "max_iou_match(Tensor anchors, Tensor pred_boxes, Tensor cls_scores, "
      "Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets, Tensor? gt_crowd, "
      "float[]? box_coder, bool scores_are_probabilities, float iou_positive, float iou_ignored, "
      "int low_quality, float iou_low_quality, float crowd_overlap) -> (Tensor, Tensor)");
  // ATSS reads no predictions. level_sizes: A in all, of at most 16 levels; k: 1 to 128; center_margin: None for none.
  m.def(
      "atss_match(Tensor anchors, Tensor pred_boxes, Tensor cls_scores, "
      "Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets, Tensor? gt_crowd, "
      "float[]? box_coder, bool scores_are_probabilities, int[] level_sizes, int k, float? center_margin, "
      "float crowd_overlap) -> (Tensor, Tensor)");

  // Task-aligned matching returns soft_targets (B, A) float32 between the two. k_after_conflict 0: no such step.
  // inside_first: an object selects from the anchors inside it, else from all. conflict: 0 selecting, 1 inside, 2 all.
  m.def(
      "task_aligned_match(Tensor anchors, Tensor pred_boxes, Tensor cls_scores, "
      "Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets, Tensor? gt_crowd, "
      "float[]? box_coder, bool scores_are_probabilities, float alpha, float beta, int k, int k_after_conflict, "
      "bool by_ciou, bool inside_first, int conflict, float minimum_side, float center_margin, "
      "float epsilon, float crowd_overlap) -> (Tensor, Tensor, Tensor)");

  // SimOTA and dynamic soft label matching return the same. candidates: 0 box_or_center, 1 center.
  m.def(
      "simota_match(Tensor anchors, Tensor pred_boxes, Tensor cls_scores, "
      "Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets, Tensor? gt_crowd, "
      "float[]? box_coder, bool scores_are_probabilities, int k, float center_radius, float iou_weight, "
      "float cls_weight, int candidates, float crowd_overlap) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dynamic_soft_label_match(Tensor anchors, Tensor pred_boxes, Tensor cls_scores, "
      "Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets, Tensor? gt_crowd, "
      "float[]? box_coder, bool scores_are_probabilities, int k, float soft_center_radius, float iou_weight, "
      "float crowd_overlap) -> (Tensor, Tensor, Tensor)");

  // Dynamic mutual matching has two matches, as mutual matching: it returns cls_match, loc_match, the qualities of
  // their positives (B, A) float32, and how many anchors each object has in each match (N,) int32. k: 1 to 128.
  m.def(
      "dynamic_mutual_match(Tensor anchors, Tensor pred_boxes, Tensor cls_scores, "
      "Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets, Tensor? gt_crowd, "
      "float[]? box_coder, bool scores_are_probabilities, "
      "bool classification_by_regressed, bool localization_by_amplified, int k, float sigma, float crowd_overlap) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Why the CUDA kernels of this library do not run on a device: "" where they do. Without a CUDA backend in the
  // library the operator has no kernel.
  m.def("cuda_device_error(int device_index) -> str");
}
