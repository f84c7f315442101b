// SimOTA and dynamic soft label matching as both backends have them: the options, and what the definitions say of one
// pair. No torch in here.
#pragma once

#include "power.h"
#include "ranked.h"

namespace mg_ops {

// What makes a candidate, and what a pair costs.
enum class DynamicKRule : int32_t {
  kBoxOrCenter,  // SimOTA: inside of an object or near its center, and both for its own without a penalty
  kCenter,       // SimOTA: near the center
  kSoftLabel,    // dynamic soft label matching: inside of an object
};

struct DynamicKProblem : MatchProblem {
  DynamicKRule rule;
  int32_t k;
  float center_radius;  // of the soft center where the rule is kSoftLabel
  float iou_weight, cls_weight, crowd_overlap;
  float epsilon, penalty;
  float* soft_targets;  // (B, A)
};

inline void set_constants(DynamicKProblem& problem) {
  problem.epsilon = problem.rule == DynamicKRule::kCenter ? 1e-8f : 1e-7f;
  problem.penalty = problem.rule == DynamicKRule::kCenter ? 1e6f : 1e5f;
}

// No cross-entropy of a class is more.
constexpr float kMostLoss = 100.0f;

MG_OPS_INLINE float natural_log(float x) { return det_log2(x) * 0.69314718f; }

// What the score of a class says.
struct ClassLosses {
  float p, of_target, of_other;  // -ln p, -ln(1 - p)
};

// NaN counts as p = 0.
MG_OPS_INLINE ClassLosses class_losses(float score, bool is_probability) {
  if (is_probability) {
    const float p = score > 0.0f ? (score > 1.0f ? 1.0f : score) : 0.0f;
    const float of_target = -natural_log(p > 0.0f ? p : 1.0f), of_other = -det_log1p(p < 1.0f ? -p : 0.0f);
    return {p, (p > 0.0f) & (of_target < kMostLoss) ? of_target : kMostLoss, p < 1.0f ? of_other : kMostLoss};
  }
  const float x = score > -kMostLoss ? (score > kMostLoss ? kMostLoss : score) : -kMostLoss;
  const float e = det_exp(x < 0.0f ? x : -x), tail = det_log1p(e);
  return {(x < 0.0f ? e : 1.0f) / (1.0f + e), (x < 0.0f ? -x : 0.0f) + tail, (x > 0.0f ? x : 0.0f) + tail};
}

// What a class adds to the sum of its anchor, as if no class were the target.
MG_OPS_INLINE float loss_if_other(float score, bool is_probability, bool is_soft) {
  const ClassLosses losses = class_losses(score, is_probability);
  return is_soft ? losses.of_other * (losses.p * losses.p) : losses.of_other;
}

MG_OPS_INLINE float iou_cost(float iou, float epsilon, float weight) { return -natural_log(iou + epsilon) * weight; }

// The class cost of a pair: the sum of its anchor, with the object's class as the target. `score` is of that class.
MG_OPS_INLINE float class_cost(float sum, float score, float iou, bool is_probability, bool is_soft) {
  const ClassLosses losses = class_losses(score, is_probability);
  float difference = losses.of_target - losses.of_other;
  if (is_soft) {
    const float cross_entropy = iou * losses.of_target + (1.0f - iou) * losses.of_other, error = iou - losses.p;
    difference = cross_entropy * (error * error) - losses.of_other * (losses.p * losses.p);
  }
  const float cost = sum + difference;
  return cost > 0.0f ? cost : 0.0f;
}

// A class of no score, as of an unknown label.
constexpr float kNoScore = -kMaxFloat;

MG_OPS_INLINE bool is_in_box(Point point, const Box& box) {
  return (point.x > box.x1) & (point.x < box.x2) & (point.y > box.y1) & (point.y < box.y2);
}

// The square around the center of an object that its candidates lie in.
MG_OPS_INLINE Box center_square(const Box& object, float reach) {
  const float x = (object.x1 + object.x2) * 0.5f, y = (object.y1 + object.y2) * 0.5f;
  return {x - reach, y - reach, x + reach, y + reach};
}

// Whether a point with a width is near an object: a candidate.
MG_OPS_INLINE bool is_near(Point point, float width, const Box& object, DynamicKRule rule, float center_radius) {
  const bool in_box = is_in_box(point, object);
  const bool in_square = is_in_box(point, center_square(object, center_radius * width));
  return rule == DynamicKRule::kSoftLabel ? in_box : rule == DynamicKRule::kCenter ? in_square : in_box | in_square;
}

// The box around centers, and the widest of their anchors.
struct CenterBounds {
  Box box;
  float widest;
};

MG_OPS_INLINE bool can_be_in_box(const Box& bounds, const Box& box) {
  return (bounds.x1 < box.x2) & (bounds.x2 > box.x1) & (bounds.y1 < box.y2) & (bounds.y2 > box.y1);
}

// Whether one of these anchors can be near an object.
MG_OPS_INLINE bool can_be_near(const CenterBounds& bounds, const Box& object, DynamicKRule rule, float center_radius) {
  const bool in_box = can_be_in_box(bounds.box, object);
  const bool in_square = can_be_in_box(bounds.box, center_square(object, center_radius * bounds.widest));
  return rule == DynamicKRule::kSoftLabel ? in_box : rule == DynamicKRule::kCenter ? in_square : in_box | in_square;
}

// Whether one can be where a pair costs no penalty.
MG_OPS_INLINE bool can_be_cheap(const CenterBounds& bounds, const Box& object, DynamicKRule rule, float center_radius) {
  return can_be_near(bounds, object, rule, center_radius) &&
         (rule != DynamicKRule::kBoxOrCenter || (can_be_near(bounds, object, DynamicKRule::kSoftLabel, center_radius) &&
                                                 can_be_near(bounds, object, DynamicKRule::kCenter, center_radius)));
}

// What a pair costs for where the anchor is: never NaN.
MG_OPS_INLINE float place_cost(Point point, float width, const Box& object, DynamicKRule rule, float center_radius,
                               float penalty) {
  if (rule == DynamicKRule::kSoftLabel) {
    const float dx = point.x - (object.x1 + object.x2) * 0.5f, dy = point.y - (object.y1 + object.y2) * 0.5f;
    const float cost = det_exp10(square_root(dx * dx + dy * dy) / width - center_radius);
    return cost <= kMaxFloat ? cost : bits_float(0x7f800000u);
  }
  const bool in_square = is_in_box(point, center_square(object, center_radius * width));
  const bool in_box = rule == DynamicKRule::kCenter || is_in_box(point, object);
  return in_square & in_box ? 0.0f : penalty;
}

// The order of a cost as an unsigned integer: less cost, larger integer, and never 0. No cost is NaN or -0.
MG_OPS_INLINE uint32_t cost_order(float cost) {
  const uint32_t bits = float_bits(cost);
  return (bits >> 31) != 0 ? bits : bits ^ 0x7fffffffu;
}

// The order of the least cost of a pair without an IoU: anywhere, or where none can be cheap.
MG_OPS_INLINE uint32_t order_without_iou(const DynamicKProblem& problem, bool may_be_cheap) {
  const float penalty = may_be_cheap || problem.rule == DynamicKRule::kSoftLabel ? 0.0f : problem.penalty;
  return cost_order(iou_cost(0.0f, problem.epsilon, problem.iou_weight) + penalty);
}

}  // namespace mg_ops
