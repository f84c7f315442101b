// What the rules share in which each object selects its best anchors: anchors as points, and the largest k. No torch in
// here.
#pragma once

#include "problem.h"

namespace mg_ops {

// The most anchors that an object selects; MAX_K of mg_ops/rules/options.py.
constexpr int32_t kMaxK = 128;

// A sum is made of so many: value i is added to number i modulo 16. Then their second half is added to the first, until
// one is left.
constexpr int64_t kSumLanes = 16;

// The center of an anchor.
struct Point {
  float x, y;
};

// What stands for a center that is not finite: inside of nothing, and not near anything.
constexpr Point kNowhere = {kMaxFloat, kMaxFloat};

MG_OPS_INLINE Point box_center(const Box& anchor) {
  const Point center = {(anchor.x1 + anchor.x2) * 0.5f, (anchor.y1 + anchor.y2) * 0.5f};
  const bool keep = is_finite(center.x) & is_finite(center.y);
  return {keep ? center.x : kNowhere.x, keep ? center.y : kNowhere.y};
}

// Whether a point lies farther than `margin` from each side of a box, on the inner side.
MG_OPS_INLINE bool is_inside(Point point, const Box& box, float margin) {
  return (point.x - box.x1 > margin) & (point.y - box.y1 > margin) & (box.x2 - point.x > margin) &
         (box.y2 - point.y > margin);
}

// How many anchors an object selects, given the sum of its largest IoUs, or qualities of at most 1.
MG_OPS_INLINE int32_t count_to_select(float total, int64_t num_candidates) {
  const int32_t count = static_cast<int32_t>(total);
  return num_candidates < count ? static_cast<int32_t>(num_candidates) : count < 1 ? 1 : count;
}

}  // namespace mg_ops
