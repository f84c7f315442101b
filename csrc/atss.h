// ATSS as both backends have it: the options, distances of centers, and the threshold of an object's candidates.
// Candidates are found by what compares numbers. No torch in here.
#pragma once

#include "power.h"
#include "ranked.h"

namespace mg_ops {

constexpr int32_t kMaxLevels = 16;                      // MAX_LEVELS of mg_ops/rules/options.py
constexpr int32_t kMaxCandidates = kMaxLevels * kMaxK;  // of an object

struct AtssProblem : MatchProblem {
  int32_t k, num_levels;
  int32_t level_begin[kMaxLevels + 1];  // anchors [level_begin[l], level_begin[l + 1]) are of level l
  float center_margin;
  bool test_centers;
  float crowd_overlap;
};

// How many candidates each object has in a level.
MG_OPS_INLINE int32_t candidates_of_level(const AtssProblem& problem, int32_t level) {
  const int32_t size = problem.level_begin[level + 1] - problem.level_begin[level];
  return size < problem.k ? size : problem.k;
}

// And in all.
MG_OPS_INLINE int32_t candidates_of_object(const AtssProblem& problem) {
  int32_t count = 0;
  for (int32_t level = 0; level < problem.num_levels; ++level) {
    count += candidates_of_level(problem, level);
  }
  return count;
}

// The center of an object. One that is not finite is far from everything, also from an anchor that is nowhere.
MG_OPS_INLINE Point object_center(const Box& object) {
  const Point center = box_center(object);
  return center.x == kNowhere.x ? Point{-kMaxFloat, -kMaxFloat} : center;
}

// The order of a distance as an unsigned integer: the nearer, the smaller.
constexpr uint32_t kInfiniteDistance = 0x7f800000u;

// Of the distance of two points this far from each other along each axis, infinite where one of them is not finite.
MG_OPS_INLINE uint32_t distance_order(float x, float y) { return float_bits(square_root(x * x + y * y)); }

// A bound of that to any point inside of a box. The same operations round the same way: it holds to the last bit.
MG_OPS_INLINE uint32_t least_distance_order(Point center, const Box& bounds) {
  const float x = max_float(max_float(bounds.x1 - center.x, center.x - bounds.x2), 0.0f);
  const float y = max_float(max_float(bounds.y1 - center.y, center.y - bounds.y2), 0.0f);
  return distance_order(x, y);
}

// One integer that compares as (distance, then index): the smaller key wins.
MG_OPS_INLINE uint64_t nearest_key(uint32_t distance, uint32_t index) {
  return (static_cast<uint64_t>(distance) << 32) | index;
}

// Mean plus unbiased standard deviation of the `count` (1 or more) IoUs; sum(iou, count, value) adds up value(iou[i]).
template <class Sum>
MG_OPS_INLINE float mean_plus_deviation(const float* iou, int32_t count, Sum sum) {
  const float mean = sum(iou, count, [](float number) { return number; }) / static_cast<float>(count);
  const float squares = sum(iou, count, [mean](float number) { return (number - mean) * (number - mean); });
  return mean + square_root(squares / static_cast<float>(count > 1 ? count - 1 : 1));
}

// Whether a candidate's IoU is that of a positive.
MG_OPS_INLINE bool reaches(float iou, float threshold) { return (iou >= threshold) & (iou > 0.0f); }

// Whether a candidate's center is where that of a positive may be.
MG_OPS_INLINE bool passes_center_test(const AtssProblem& problem, const Box& anchor, const Box& object) {
  return !problem.test_centers || is_inside(box_center(anchor), object, problem.center_margin);
}

}  // namespace mg_ops
