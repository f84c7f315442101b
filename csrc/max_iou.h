// Max-IoU matching as both backends have it: the options, and the label that an anchor's best IoU gives it. The rest of
// the rule compares IoUs. No torch in here.
#pragma once

#include "problem.h"

namespace mg_ops {

// What an object does with its best anchors; docs/definition/max_iou_match.md.
enum class LowQuality : int32_t { kNone, kKeepOwner, kTakeAll, kTakeFirst };

struct MaxIouProblem : MatchProblem {
  float iou_positive, iou_ignored, iou_low_quality, crowd_overlap;
  LowQuality low_quality;
};

// The label of an anchor whose best quality, of this order, is with `object`.
MG_OPS_INLINE int64_t label_by_threshold(const MaxIouProblem& problem, uint32_t order, int64_t object) {
  const float iou = bits_float(order);
  return iou >= problem.iou_positive ? object : iou >= problem.iou_ignored ? kIgnored : kBackground;
}

// Whether an object whose best quality has this order makes low-quality matches.
MG_OPS_INLINE bool makes_low_quality_matches(const MaxIouProblem& problem, uint32_t best_order) {
  return problem.low_quality != LowQuality::kNone && best_order != 0 &&
         bits_float(best_order) >= problem.iou_low_quality;
}

}  // namespace mg_ops
