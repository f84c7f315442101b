// What the definition says of one (anchor, object) pair beyond geometry: amplified quality, and how qualities compare.
#pragma once

#include "box.h"

namespace mg_ops {

// Values of the class and localization matches below 0; the same numbers as torchvision's Matcher.
constexpr int64_t kBackground = -1;
constexpr int64_t kIgnored = -2;

struct MatchParams {
  bool classification_by_regressed;  // rank classification under q_regressed, else q_anchor
  bool localization_by_amplified;    // rank localization under q_amplified, else q_anchor
  float sigma;
  float iou_positive;
  float iou_ignored;
  float crowd_overlap;
};

// p of a score: sigmoid(score) of a logit, or the score itself, kept within [0, 1]. NaN counts as p = 0.
MG_OPS_INLINE float class_probability(float score, bool is_probability) {
  const float p = is_probability ? (score > 1.0f ? 1.0f : score) : det_sigmoid(score);
  return p > 0.0f ? p : 0.0f;
}

// log2 of q_amplified = q ** ((sigma - p) / sigma) (Eq. 1), for q > 0: never above 0, and exactly 0 at q = 1. Amplified
// qualities are compared by this exponent, so the power itself is never taken.
MG_OPS_INLINE float amplified_exponent(float log2_q, float p, float sigma) { return ((sigma - p) / sigma) * log2_q; }

// The order of an IoU q > 0 as an unsigned integer: larger quality, larger integer. 0 is left for "no quality".
MG_OPS_INLINE uint32_t iou_order(float q) { return float_bits(q); }

// The same of an exponent <= 0. Adding +0 turns -0 into +0, so that both zeros are one quality.
MG_OPS_INLINE uint32_t exponent_order(float exponent) { return ~float_bits(exponent + 0.0f); }

// The order of quality 1, which the pair (best[g], g) gets.
constexpr uint32_t kForcedIouOrder = 0x3f800000u;       // iou_order(1)
constexpr uint32_t kForcedExponentOrder = 0xffffffffu;  // exponent_order(0)

// One integer that compares as (quality, then lower index first): the larger key wins.
MG_OPS_INLINE uint64_t claim_key(uint32_t order, uint32_t index) {
  return (static_cast<uint64_t>(order) << 32) | static_cast<uint32_t>(~index);
}
MG_OPS_INLINE uint32_t key_index(uint64_t key) { return ~static_cast<uint32_t>(key); }
MG_OPS_INLINE uint32_t key_order(uint64_t key) { return static_cast<uint32_t>(key >> 32); }

}  // namespace mg_ops
