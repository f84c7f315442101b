// One call as the kernels of both halves take it: inputs read where they lie, whatever their strides and float type,
// the options, and where the results go. No torch in here.
#pragma once

#include "assignment.h"

namespace mg_ops {

enum class FloatType : int32_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

MG_OPS_INLINE int64_t bytes_of(FloatType type) {
  return type == FloatType::kFloat64 ? 8 : type == FloatType::kFloat32 ? 4 : 2;
}

// A floating tensor of up to three dimensions: images, rows (anchors or objects) and columns. What all images share has
// an image stride of 0. Strides in elements.
struct FloatInput {
  const void* data;
  int64_t image_stride, row_stride, column_stride;
  FloatType type;
  bool whole_rows;  // the four numbers of a row are neighbors and aligned: one or two wide loads bring them
};

// An int64 or int32 vector.
struct IntegerInput {
  const void* data;
  int64_t stride;
  bool is_int64;
};

// float16 has fewer exponents than float32 and the same meaning of the rest: move the bits, then correct the bias from
// 15 to 127 by an exact multiplication, which also makes subnormals right. Infinities and NaN keep the largest
// exponent.
MG_OPS_INLINE float float16_to_float(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const float scaled = bits_float(magnitude) * 5.192296858534828e33f;  // 2^112
  return bits_float(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : float_bits(scaled)));
}

MG_OPS_INLINE float bfloat16_to_float(uint32_t bits) { return bits_float(bits << 16); }

// The nearest bfloat16, the even one of two; NaN stays NaN.
MG_OPS_INLINE uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u);
}

// The nearest float16, the even one of two, infinite beyond 65520; NaN stays NaN.
MG_OPS_INLINE uint16_t float_to_float16(float x) {
  const uint32_t sign = (float_bits(x) >> 16) & 0x8000u;
  const uint32_t magnitude = float_bits(x) & 0x7fffffffu;
  // Normal: round the 13 bits that go, then correct the bias. Subnormal: adding 1/2 leaves the rounded result in the
  // low bits, in units of the smallest float16.
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t result = magnitude > 0x7f800000u ? 0x7e00u : magnitude >= 0x477ff000u ? 0x7c00u : finite;
  return static_cast<uint16_t>(sign | result);
}

// B images, A anchors, C classes, N objects in all.
struct MatchProblem {
  FloatInput anchors;                  // (A, 4)
  FloatInput pred_boxes;               // (B, A, 4) boxes, or deltas where `decode`
  FloatInput cls_scores;               // (B, A, C) logits, or probabilities where `scores_are_probabilities`
  FloatInput gt_boxes;                 // (N, 4)
  IntegerInput gt_labels, gt_offsets;  // (N,), (B + 1,)
  const uint8_t* gt_crowd;             // (N,); null: none is
  int64_t crowd_stride;
  int64_t batch_size, num_anchors, num_classes, num_gt;
  bool decode, scores_are_probabilities;
  BoxCoder coder;
  MatchParams params;
  int64_t *cls_match, *loc_match;  // (B, A)
  int32_t *num_pos, *num_total;    // (N,)
};

}  // namespace mg_ops
