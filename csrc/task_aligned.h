// Task-aligned matching as both backends have it: the options, and what the definition says of one pair. No torch in
// here.
#pragma once

#include "power.h"
#include "ranked.h"

namespace mg_ops {

// Which objects an anchor that several have selected may belong to.
enum class Conflict : int32_t { kSelecting, kInside, kAll };

struct TaskAlignedProblem : MatchProblem {
  Exponent alpha, beta;
  int32_t k, k_after_conflict;  // the latter 0: no such step
  bool by_ciou;
  bool inside_first;  // an object selects from the anchors inside it; else from all, and the others are dropped
  Conflict conflict;
  float minimum_side, center_margin, epsilon, crowd_overlap;
  float* soft_targets;  // (B, A)
};

// The box that an anchor's center must be inside of.
MG_OPS_INLINE Box gate_box(const Box& object, float minimum_side) {
  const float x = (object.x1 + object.x2) * 0.5f, y = (object.y1 + object.y2) * 0.5f, half = 0.5f * minimum_side;
  const bool narrow = object.x2 - object.x1 < minimum_side, low = object.y2 - object.y1 < minimum_side;
  return {narrow ? x - half : object.x1, low ? y - half : object.y1, narrow ? x + half : object.x2,
          low ? y + half : object.y2};
}

MG_OPS_INLINE float box_angle(const Box& box) { return det_atan((box.x2 - box.x1) / (box.y2 - box.y1)); }

// CIoU of two finite boxes of an IoU above 0; 0 where it is negative.
MG_OPS_INLINE float positive_ciou(const Box& box, const Box& object, float object_angle, float iou) {
  const float dx = (object.x1 + object.x2) - (box.x1 + box.x2), dy = (object.y1 + object.y2) - (box.y1 + box.y2);
  const float w = max_float(box.x2, object.x2) - min_float(box.x1, object.x1);
  const float h = max_float(box.y2, object.y2) - min_float(box.y1, object.y1);
  const float rho2 = (dx * dx + dy * dy) * 0.25f, c2 = w * w + h * h;
  const float difference = object_angle - box_angle(box);
  const float v = (difference * difference) * 0.40528473456935109f;
  const float ciou = iou - (rho2 / c2 + v * (v / ((v - iou) + 1.0000001f)));
  return ciou > 0.0f ? ciou : 0.0f;
}

// u of a pair: the overlap of a finite predicted box with an object.
MG_OPS_INLINE float pair_overlap(const TaskAlignedProblem& problem, const Box& box, float area, const Box& object,
                                 float object_area) {
  const float iou = box_iou(box, area, object, object_area);
  return problem.by_ciou && iou > 0.0f ? positive_ciou(box, object, box_angle(object), iou) : iou;
}

// t of a pair of which overlap**beta is known; 0 without an overlap.
MG_OPS_INLINE float pair_metric(const TaskAlignedProblem& problem, float p, float overlap, float overlap_power) {
  return overlap > 0.0f ? power(p, problem.alpha) * overlap_power : 0.0f;
}

MG_OPS_INLINE float soft_target(const TaskAlignedProblem& problem, float metric, float largest_metric,
                                float largest_overlap) {
  return positive_ratio(metric * largest_overlap, largest_metric + problem.epsilon);
}

}  // namespace mg_ops
