// One call as the kernels of both halves take it: inputs read where they lie, whatever their strides and float type,
// the options, and where the results go. No torch in here.
#pragma once

#include "assignment.h"

namespace mg_ops {

enum class FloatType : int32_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

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
