// mg_ops::atss_match, once for both backends, as mutual_match.h is for mutual matching.
#pragma once

#include "atss.h"
#include "mutual_match.h"

namespace mg_ops {

// Raises unless the levels' anchors are all anchors; fills where each level begins.
inline void read_levels(AtssProblem& problem, const std::vector<int64_t>& level_sizes, int64_t num_anchors) {
  if (level_sizes.size() > kMaxLevels) {
    fail("level_sizes: expected at most ", kMaxLevels, " levels, got ", level_sizes.size());
  }
  int64_t sum = 0;
  for (const int64_t size : level_sizes) {
    if (size < 0 || size > num_anchors - sum) {
      fail("level_sizes: expected numbers from 0 on with a sum of ", num_anchors, ", the number of anchors");
    }
    sum += size;
    problem.level_begin[++problem.num_levels] = static_cast<int32_t>(sum);
  }
  if (sum != num_anchors) {
    fail("level_sizes: expected a sum of ", num_anchors, ", the number of anchors, got ", sum);
  }
}

template <void (*run)(const AtssProblem& problem, const Tensor& anchors)>
std::tuple<Tensor, Tensor> atss_match(Tensor anchors, Tensor pred_boxes, Tensor cls_scores, Tensor gt_boxes,
                                      Tensor gt_labels, Tensor gt_offsets, const std::optional<Tensor>& gt_crowd,
                                      const std::optional<std::vector<double>>& box_coder,
                                      bool scores_are_probabilities, const std::vector<int64_t>& level_sizes, int64_t k,
                                      const std::optional<double>& center_margin, double crowd_overlap) {
  check_count("k", k, 1, kMaxK);
  check_from_zero("center_margin", center_margin.value_or(0.0), kMaxNumber, "None or a finite number of at least 0");
  check_number("crowd_overlap", crowd_overlap, 0.0, 1.0, "a threshold in (0, 1]");
  AtssProblem problem{};
  read_inputs(problem, anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd, box_coder,
              scores_are_probabilities);
  read_levels(problem, level_sizes, problem.num_anchors);
  problem.k = static_cast<int32_t>(k);
  problem.test_centers = center_margin.has_value();
  problem.center_margin = static_cast<float>(center_margin.value_or(0.0));
  problem.crowd_overlap = static_cast<float>(crowd_overlap);

  const Tensor cls_match = new_result(anchors, {problem.batch_size, problem.num_anchors}, ScalarType::Long);
  const Tensor num_pos = new_result(anchors, {problem.num_gt}, ScalarType::Int);
  problem.cls_match = static_cast<int64_t*>(cls_match.mutable_data_ptr());
  problem.num_pos = static_cast<int32_t*>(num_pos.mutable_data_ptr());
  run(problem, anchors);
  return {cls_match, num_pos};
}

}  // namespace mg_ops
