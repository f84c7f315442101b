// Boxes: validity, decoding, IoU. The arithmetic of the definition, one rounded float32 operation at a time.
#pragma once

#include "det_math.h"

namespace mg_ops {

// (x1, y1, x2, y2), in the one unit all boxes of a call share.
struct Box {
  float x1, y1, x2, y2;
};

// torchvision's box coder: deltas are divided by the weights, log sizes are cut at `clip`.
struct BoxCoder {
  float weight_x, weight_y, weight_w, weight_h;
  float clip;
};

MG_OPS_INLINE bool is_finite(const Box& box) {
  return is_finite(box.x1) & is_finite(box.y1) & is_finite(box.x2) & is_finite(box.y2);
}

// A box with four finite coordinates unchanged; any other becomes the empty box at the origin, which overlaps nothing.
// min and max then never meet a NaN, on which instruction sets disagree.
MG_OPS_INLINE Box finite_or_empty(const Box& box) {
  const bool keep = is_finite(box);
  return {keep ? box.x1 : 0.0f, keep ? box.y1 : 0.0f, keep ? box.x2 : 0.0f, keep ? box.y2 : 0.0f};
}

// An object the matching can look for: finite, x2 > x1, y2 > y1.
MG_OPS_INLINE bool is_object(const Box& box) { return is_finite(box) & (box.x2 > box.x1) & (box.y2 > box.y1); }

MG_OPS_INLINE float box_area(const Box& box) { return (box.x2 - box.x1) * (box.y2 - box.y1); }

// Of numbers. A GPU has one instruction for each; of -0 and 0 it may return the other one, which no quality shows.
#ifdef __CUDA_ARCH__
MG_OPS_INLINE float min_float(float a, float b) { return fminf(a, b); }
MG_OPS_INLINE float max_float(float a, float b) { return fmaxf(a, b); }
#else
MG_OPS_INLINE float min_float(float a, float b) { return a < b ? a : b; }
MG_OPS_INLINE float max_float(float a, float b) { return a > b ? a : b; }
#endif

// Area of the intersection of two finite boxes; 0 where they do not overlap.
MG_OPS_INLINE float intersection_area(const Box& a, const Box& b) {
  const float w = min_float(a.x2, b.x2) - max_float(a.x1, b.x1);
  const float h = min_float(a.y2, b.y2) - max_float(a.y1, b.y1);
  return (w > 0.0f) & (h > 0.0f) ? w * h : 0.0f;
}

// numerator / denominator where that is finite and positive, else 0.
MG_OPS_INLINE float positive_ratio(float numerator, float denominator) {
  const float ratio = numerator / denominator;
  return (ratio > 0.0f) & (ratio <= kMaxFloat) ? ratio : 0.0f;
}

// IoU of two finite boxes whose areas are at hand.
MG_OPS_INLINE float box_iou(const Box& a, float area_a, const Box& b, float area_b) {
  const float intersection = intersection_area(a, b);
  return positive_ratio(intersection, (area_a + area_b) - intersection);
}

// One axis of the decoding: [first, second] of the anchor moved by delta_center and scaled by exp(delta_size).
struct Interval {
  float first, second;
};

MG_OPS_INLINE Interval decode_interval(float first, float second, float delta_center, float delta_size,
                                       float weight_center, float weight_size, float clip) {
  const float size = second - first;
  const float center = first + 0.5f * size;
  const float new_center = (delta_center / weight_center) * size + center;
  const float log_scale = delta_size / weight_size;
  // Written so that NaN stays NaN (the box is then not finite, and overlaps nothing).
  const float new_size = det_exp(log_scale > clip ? clip : log_scale) * size;
  const float half = 0.5f * new_size;
  return {new_center - half, new_center + half};
}

// The box that regression deltas (dx, dy, dw, dh) make of an anchor.
MG_OPS_INLINE Box decode_box(const Box& anchor, float dx, float dy, float dw, float dh, const BoxCoder& coder) {
  const Interval x = decode_interval(anchor.x1, anchor.x2, dx, dw, coder.weight_x, coder.weight_w, coder.clip);
  const Interval y = decode_interval(anchor.y1, anchor.y2, dy, dh, coder.weight_y, coder.weight_h, coder.clip);
  return {x.first, y.first, x.second, y.second};
}

}  // namespace mg_ops
