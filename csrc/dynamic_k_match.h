// mg_ops::simota_match and mg_ops::dynamic_soft_label_match, once for both backends, as mutual_match.h is for mutual
// matching.
#pragma once

#include "dynamic_k.h"
#include "mutual_match.h"

namespace mg_ops {

using DynamicKResults = std::tuple<Tensor, Tensor, Tensor>;

// Allocates the results of a problem whose inputs and options are set, and runs it.
template <void (*run)(const DynamicKProblem& problem, const Tensor& anchors)>
DynamicKResults run_dynamic_k(DynamicKProblem& problem, const Tensor& anchors) {
  set_constants(problem);
  const Tensor cls_match = new_result(anchors, {problem.batch_size, problem.num_anchors}, ScalarType::Long);
  const Tensor soft_targets = new_result(anchors, {problem.batch_size, problem.num_anchors}, ScalarType::Float);
  const Tensor num_pos = new_result(anchors, {problem.num_gt}, ScalarType::Int);
  problem.cls_match = static_cast<int64_t*>(cls_match.mutable_data_ptr());
  problem.soft_targets = static_cast<float*>(soft_targets.mutable_data_ptr());
  problem.num_pos = static_cast<int32_t*>(num_pos.mutable_data_ptr());
  run(problem, anchors);
  return {cls_match, soft_targets, num_pos};
}

template <void (*run)(const DynamicKProblem& problem, const Tensor& anchors)>
DynamicKResults simota_match(Tensor anchors, Tensor pred_boxes, Tensor cls_scores, Tensor gt_boxes, Tensor gt_labels,
                             Tensor gt_offsets, const std::optional<Tensor>& gt_crowd,
                             const std::optional<std::vector<double>>& box_coder, bool scores_are_probabilities,
                             int64_t k, double center_radius, double iou_weight, double cls_weight, int64_t candidates,
                             double crowd_overlap) {
  check_count("k", k, 1, kMaxK);
  check_from_zero("center_radius", center_radius, kMaxNumber, "a finite number of at least 0");
  check_from_zero("iou_weight", iou_weight, kMaxNumber, "a finite number of at least 0");
  check_from_zero("cls_weight", cls_weight, kMaxNumber, "a finite number of at least 0");
  check_count("candidates", candidates, 0, static_cast<int64_t>(DynamicKRule::kCenter));
  check_number("crowd_overlap", crowd_overlap, 0.0, 1.0, "a threshold in (0, 1]");
  DynamicKProblem problem{};
  read_inputs(problem, anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd, box_coder,
              scores_are_probabilities);
  problem.rule = static_cast<DynamicKRule>(candidates);
  problem.k = static_cast<int32_t>(k);
  problem.center_radius = static_cast<float>(center_radius);
  problem.iou_weight = static_cast<float>(iou_weight);
  problem.cls_weight = static_cast<float>(cls_weight);
  problem.crowd_overlap = static_cast<float>(crowd_overlap);
  return run_dynamic_k<run>(problem, anchors);
}

template <void (*run)(const DynamicKProblem& problem, const Tensor& anchors)>
DynamicKResults dynamic_soft_label_match(Tensor anchors, Tensor pred_boxes, Tensor cls_scores, Tensor gt_boxes,
                                         Tensor gt_labels, Tensor gt_offsets, const std::optional<Tensor>& gt_crowd,
                                         const std::optional<std::vector<double>>& box_coder,
                                         bool scores_are_probabilities, int64_t k, double soft_center_radius,
                                         double iou_weight, double crowd_overlap) {
  check_count("k", k, 1, kMaxK);
  check_from_zero("soft_center_radius", soft_center_radius, kMaxNumber, "a finite number of at least 0");
  check_from_zero("iou_weight", iou_weight, kMaxNumber, "a finite number of at least 0");
  check_number("crowd_overlap", crowd_overlap, 0.0, 1.0, "a threshold in (0, 1]");
  DynamicKProblem problem{};
  read_inputs(problem, anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd, box_coder,
              scores_are_probabilities);
  problem.rule = DynamicKRule::kSoftLabel;
  problem.k = static_cast<int32_t>(k);
  problem.center_radius = static_cast<float>(soft_center_radius);
  problem.iou_weight = static_cast<float>(iou_weight);
  problem.cls_weight = 1.0f;
  problem.crowd_overlap = static_cast<float>(crowd_overlap);
  return run_dynamic_k<run>(problem, anchors);
}

}  // namespace mg_ops
