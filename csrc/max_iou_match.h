// mg_ops::max_iou_match, once for both backends, as mutual_match.h is for mutual matching.
#pragma once

#include "max_iou.h"
#include "mutual_match.h"

namespace mg_ops {

template <void (*run)(const MaxIouProblem& problem, const Tensor& anchors)>
std::tuple<Tensor, Tensor> max_iou_match(Tensor anchors, Tensor pred_boxes, Tensor cls_scores, Tensor gt_boxes,
                                         Tensor gt_labels, Tensor gt_offsets, const std::optional<Tensor>& gt_crowd,
                                         const std::optional<std::vector<double>>& box_coder,
                                         bool scores_are_probabilities, double iou_positive, double iou_ignored,
                                         int64_t low_quality, double iou_low_quality, double crowd_overlap) {
  check_iou_thresholds(iou_positive, iou_ignored, crowd_overlap);
  check_count("low_quality", low_quality, 0, static_cast<int64_t>(LowQuality::kTakeFirst));
  check_from_zero("iou_low_quality", iou_low_quality, 1.0, "a threshold in [0, 1]");
  MaxIouProblem problem{};
  read_inputs(problem, anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd, box_coder,
              scores_are_probabilities);
  problem.iou_positive = static_cast<float>(iou_positive);
  problem.iou_ignored = static_cast<float>(iou_ignored);
  problem.iou_low_quality = static_cast<float>(iou_low_quality);
  problem.crowd_overlap = static_cast<float>(crowd_overlap);
  problem.low_quality = static_cast<LowQuality>(low_quality);

  const Tensor cls_match = new_result(anchors, {problem.batch_size, problem.num_anchors}, ScalarType::Long);
  const Tensor num_pos = new_result(anchors, {problem.num_gt}, ScalarType::Int);
  problem.cls_match = static_cast<int64_t*>(cls_match.mutable_data_ptr());
  problem.num_pos = static_cast<int32_t*>(num_pos.mutable_data_ptr());
  run(problem, anchors);
  return {cls_match, num_pos};
}

}  // namespace mg_ops
