// mg_ops::task_aligned_match, once for both backends, as mutual_match.h is for mutual matching.
#pragma once

#include "mutual_match.h"
#include "task_aligned.h"

namespace mg_ops {

template <void (*run)(const TaskAlignedProblem& problem, const Tensor& anchors)>
std::tuple<Tensor, Tensor, Tensor> task_aligned_match(Tensor anchors, Tensor pred_boxes, Tensor cls_scores,
                                                      Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets,
                                                      const std::optional<Tensor>& gt_crowd,
                                                      const std::optional<std::vector<double>>& box_coder,
                                                      bool scores_are_probabilities, double alpha, double beta,
                                                      int64_t k, int64_t k_after_conflict, bool by_ciou,
                                                      bool inside_first, int64_t conflict, double minimum_side,
                                                      double center_margin, double epsilon, double crowd_overlap) {
  check_from_zero("alpha", alpha, 64.0, "an exponent in [0, 64]");
  check_from_zero("beta", beta, 64.0, "an exponent in [0, 64]");
  check_count("k", k, 1, kMaxK);
  check_count("k_after_conflict", k_after_conflict, 0, kMaxK);
  check_count("conflict", conflict, 0, static_cast<int64_t>(Conflict::kAll));
  check_from_zero("minimum_side", minimum_side, kMaxNumber, "a finite number of at least 0");
  check_from_zero("center_margin", center_margin, kMaxNumber, "a finite number of at least 0");
  check_from_zero("epsilon", epsilon, kMaxNumber, "a finite number of at least 0");
  check_number("crowd_overlap", crowd_overlap, 0.0, 1.0, "a threshold in (0, 1]");
  TaskAlignedProblem problem{};
  read_inputs(problem, anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd, box_coder,
              scores_are_probabilities);
  problem.alpha = make_exponent(static_cast<float>(alpha));
  problem.beta = make_exponent(static_cast<float>(beta));
  problem.k = static_cast<int32_t>(k);
  problem.k_after_conflict = static_cast<int32_t>(k_after_conflict);
  problem.by_ciou = by_ciou;
  problem.inside_first = inside_first;
  problem.conflict = static_cast<Conflict>(conflict);
  problem.minimum_side = static_cast<float>(minimum_side);
  problem.center_margin = static_cast<float>(center_margin);
  problem.epsilon = static_cast<float>(epsilon);
  problem.crowd_overlap = static_cast<float>(crowd_overlap);

  const Tensor cls_match = new_result(anchors, {problem.batch_size, problem.num_anchors}, ScalarType::Long);
  const Tensor soft_targets = new_result(anchors, {problem.batch_size, problem.num_anchors}, ScalarType::Float);
  const Tensor num_pos = new_result(anchors, {problem.num_gt}, ScalarType::Int);
  problem.cls_match = static_cast<int64_t*>(cls_match.mutable_data_ptr());
  problem.soft_targets = static_cast<float*>(soft_targets.mutable_data_ptr());
  problem.num_pos = static_cast<int32_t*>(num_pos.mutable_data_ptr());
  run(problem, anchors);
  return {cls_match, soft_targets, num_pos};
}

}  // namespace mg_ops
