// Dynamic mutual matching as both backends have it: the options, and the quality of localization. No torch in here.
#pragma once

#include "ranked.h"

namespace mg_ops {

struct DynamicMutualProblem : MatchProblem {
  bool classification_by_regressed, localization_by_amplified;
  int32_t k;
  float sigma, crowd_overlap;
  float *soft_targets, *loc_weights;  // (B, A)
  int32_t* num_loc_pos;               // (N,)
};

// The quality of localization of a pair of this IoU, above 0, whose class has the score p: at least the IoU.
MG_OPS_INLINE float amplified_quality(float iou, float p, float sigma) {
  const float quality = iou * det_exp(p / sigma);
  return quality < 1.0f ? quality : 1.0f;
}

// No pair of an IoU has a quality above this times it, before 1 cuts it: with a margin above any rounding.
MG_OPS_INLINE float most_amplification(const DynamicMutualProblem& problem) {
  return problem.localization_by_amplified ? 1.001f * det_exp(1.0f / problem.sigma) : 1.0f;
}

}  // namespace mg_ops
