// mg_ops::mutual_match, once for both backends: checks the arguments, allocates the results, and fills the one problem
// that the kernels take. A backend registers `mutual_match<its_run>`.
#pragma once

#include <tuple>

#include "inputs.h"

namespace mg_ops {

// Checks what every operator takes, and fills it into the problem. The tensors must live as long as that: one that had
// to be copied is replaced.
inline void read_inputs(MatchProblem& problem, Tensor& anchors, Tensor& pred_boxes, Tensor& cls_scores,
                        Tensor& gt_boxes, Tensor& gt_labels, Tensor& gt_offsets, const std::optional<Tensor>& gt_crowd,
                        const std::optional<std::vector<double>>& box_coder, bool scores_are_probabilities) {
  check_match_tensors(anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd);
  if (box_coder.has_value()) {
    check_box_coder(*box_coder);
  }
  for (Tensor* tensor : {&anchors, &pred_boxes, &cls_scores, &gt_boxes, &gt_labels, &gt_offsets}) {
    align(*tensor);
  }
  problem.anchors = float_input(anchors);
  problem.pred_boxes = float_input(pred_boxes);
  problem.cls_scores = float_input(cls_scores);
  problem.gt_boxes = float_input(gt_boxes);
  problem.gt_labels = integer_input(gt_labels);
  problem.gt_offsets = integer_input(gt_offsets);
  if (gt_crowd.has_value()) {
    problem.gt_crowd = static_cast<const uint8_t*>(gt_crowd->const_data_ptr());
    problem.crowd_stride = gt_crowd->stride(0);
  }
  problem.batch_size = cls_scores.size(0);
  problem.num_anchors = cls_scores.size(1);
  problem.num_classes = cls_scores.size(2);
  problem.num_gt = gt_boxes.size(0);
  problem.scores_are_probabilities = scores_are_probabilities;
  problem.decode = box_coder.has_value();
  if (problem.decode) {
    problem.coder = mg_ops::box_coder(*box_coder);
  }
}

// What csrc/schema.cpp says. `run` writes the results of the problem, whose tensors live until it returns; `anchors`
// tells it the device.
template <void (*run)(const MatchProblem& problem, const Tensor& anchors)>
std::tuple<Tensor, Tensor, Tensor, Tensor> mutual_match(Tensor anchors, Tensor pred_boxes, Tensor cls_scores,
                                                        Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets,
                                                        const std::optional<Tensor>& gt_crowd,
                                                        const std::optional<std::vector<double>>& box_coder,
                                                        bool scores_are_probabilities, bool classification_by_regressed,
                                                        bool localization_by_amplified, double sigma,
                                                        double iou_positive, double iou_ignored, double crowd_overlap) {
  check_match_numbers(sigma, iou_positive, iou_ignored, crowd_overlap);
  MatchProblem problem{};
  read_inputs(problem, anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd, box_coder,
              scores_are_probabilities);
  problem.params = {classification_by_regressed,     localization_by_amplified,
                    static_cast<float>(sigma),       static_cast<float>(iou_positive),
                    static_cast<float>(iou_ignored), static_cast<float>(crowd_overlap)};

  const Tensor cls_match = new_result(anchors, {problem.batch_size, problem.num_anchors}, ScalarType::Long);
  const Tensor loc_match = new_result(anchors, {problem.batch_size, problem.num_anchors}, ScalarType::Long);
  const Tensor num_pos = new_result(anchors, {problem.num_gt}, ScalarType::Int);
  const Tensor num_total = new_result(anchors, {problem.num_gt}, ScalarType::Int);
  problem.cls_match = static_cast<int64_t*>(cls_match.mutable_data_ptr());
  problem.loc_match = static_cast<int64_t*>(loc_match.mutable_data_ptr());
  problem.num_pos = static_cast<int32_t*>(num_pos.mutable_data_ptr());
  problem.num_total = static_cast<int32_t*>(num_total.mutable_data_ptr());
  run(problem, anchors);
  return {cls_match, loc_match, num_pos, num_total};
}

}  // namespace mg_ops
