// mg_ops::dynamic_mutual_match, once for both backends, as mutual_match.h is for mutual matching.
#pragma once

#include "dynamic_mutual.h"
#include "mutual_match.h"

namespace mg_ops {

template <void (*run)(const DynamicMutualProblem& problem, const Tensor& anchors)>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dynamic_mutual_match(
    Tensor anchors, Tensor pred_boxes, Tensor cls_scores, Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets,
    const std::optional<Tensor>& gt_crowd, const std::optional<std::vector<double>>& box_coder,
    bool scores_are_probabilities, bool classification_by_regressed, bool localization_by_amplified, int64_t k,
    double sigma, double crowd_overlap) {
  check_count("k", k, 1, kMaxK);
  check_number("sigma", sigma, 0.0, kMaxNumber, "a finite number above 0");
  check_number("crowd_overlap", crowd_overlap, 0.0, 1.0, "a threshold in (0, 1]");
  DynamicMutualProblem problem{};
  read_inputs(problem, anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd, box_coder,
              scores_are_probabilities);
  problem.classification_by_regressed = classification_by_regressed;
  problem.localization_by_amplified = localization_by_amplified;
  problem.k = static_cast<int32_t>(k);
  problem.sigma = static_cast<float>(sigma);
  problem.crowd_overlap = static_cast<float>(crowd_overlap);

  const auto of_anchors = [&](ScalarType type) {
    return new_result(anchors, {problem.batch_size, problem.num_anchors}, type);
  };
  const Tensor cls_match = of_anchors(ScalarType::Long), loc_match = of_anchors(ScalarType::Long);
  const Tensor soft_targets = of_anchors(ScalarType::Float), loc_weights = of_anchors(ScalarType::Float);
  const Tensor num_pos = new_result(anchors, {problem.num_gt}, ScalarType::Int);
  const Tensor num_loc_pos = new_result(anchors, {problem.num_gt}, ScalarType::Int);
  problem.cls_match = static_cast<int64_t*>(cls_match.mutable_data_ptr());
  problem.loc_match = static_cast<int64_t*>(loc_match.mutable_data_ptr());
  problem.soft_targets = static_cast<float*>(soft_targets.mutable_data_ptr());
  problem.loc_weights = static_cast<float*>(loc_weights.mutable_data_ptr());
  problem.num_pos = static_cast<int32_t*>(num_pos.mutable_data_ptr());
  problem.num_loc_pos = static_cast<int32_t*>(num_loc_pos.mutable_data_ptr());
  run(problem, anchors);
  return {cls_match, loc_match, soft_targets, loc_weights, num_pos, num_loc_pos};
}

}  // namespace mg_ops
