// The classification losses of dense detectors: focal, quality focal, varifocal and soft binary cross-entropy are one
// formula with four numbers. mg_ops/losses.py has the eager definition. No torch in here.
//
// An anchor has a target t > 0 at one label at most; all its other classes have target 0. With p = sigmoid(logit) and
// BCE(t) = softplus(logit) - t * logit,
//
//   at the label   positive_weight * abs(t - p) ** positive_gamma * BCE(t), times t with `weigh_by_target`
//   elsewhere      negative_weight * p ** negative_gamma * BCE(0)
//
// All arithmetic is in float32.
#pragma once

#include "problem.h"

namespace mg_ops {

struct ClassLossParams {
  float positive_weight, positive_gamma;
  float negative_weight, negative_gamma;
  bool weigh_by_target;
};

// B images, A anchors, C classes.
struct ClassLossProblem {
  FloatInput logits;                           // (B, A, C)
  const int64_t* class_targets;                // (B, A) a label in [0, C), -1 for background; else ignored
  int64_t target_image_stride, target_stride;  // of class_targets
  FloatInput soft_targets;                     // (B, A) t of anchors with a label; without data it is 1
  int64_t batch_size, num_anchors, num_classes;
  ClassLossParams params;
};

// A logit whose loss and gradient as a negative are 0, whatever the exponent.
constexpr float kNeverPositive = -1000.0f;

// What the losses need of a logit x, without cancellation on either side.
struct Sigmoid {
  float p, one_minus_p;
  float log_p, log_one_minus_p;  // -softplus(-x) and -softplus(x)
};

// e**x of x <= 0, and 1 / x. The losses need not be equal bit by bit on all backends: a GPU takes its own instructions
// for both, with errors of about two units in the last place.
#ifdef __CUDA_ARCH__
MG_OPS_INLINE float exp_of_negative(float x) {
  x = x < -126.0f ? -126.0f : x;  // written so that NaN passes through
  // The product x * log2(e) and what its rounding lost.
  const float whole = x * 1.442695041f;
  const float rest = __fmaf_rn(x, 1.442695041f, -whole) + x * 1.925963033e-8f;
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(whole));
  return __fmaf_rn(power, rest * 0.693147181f, power);
}
MG_OPS_INLINE float reciprocal_of(float x) { return __fdividef(1.0f, x); }
MG_OPS_INLINE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#else
MG_OPS_INLINE float exp_of_negative(float x) { return det_exp(x); }
MG_OPS_INLINE float reciprocal_of(float x) { return 1.0f / x; }
MG_OPS_INLINE float multiply_add(float a, float b, float c) { return a * b + c; }
#endif

MG_OPS_INLINE Sigmoid sigmoid_of(float x) {
  const bool negative = x < 0.0f;
  const float e = exp_of_negative(negative ? x : -x);
  // 1 / (1 + e) and s = e / (2 + e) by one division.
  const float reciprocal = reciprocal_of((1.0f + e) * (2.0f + e));
  const float larger = reciprocal * (2.0f + e);
  const float smaller = e * larger;
  const float s = e * (reciprocal * (1.0f + e));
  // log(1 + e) = 2 atanh(s), which keeps the precision of a small e. Minimax fit in 40-digit arithmetic, relative error
  // 4e-9 before rounding.
  const float z = s * s;
  float series = 0.2817833423614502f;
  series = multiply_add(series, z, 0.27960601449012756f);
  series = multiply_add(series, z, 0.40024909377098083f);
  series = multiply_add(series, z, 0.6666631698608398f);
  series = multiply_add(series, z, 2.0f);
  const float log_one_plus_e = series * s;
  return {negative ? smaller : larger, negative ? larger : smaller, (negative ? x : 0.0f) - log_one_plus_e,
          (negative ? 0.0f : -x) - log_one_plus_e};
}

// The exponents that need no power function.
enum class Exponent { kZero, kOne, kTwo, kAny };

MG_OPS_INLINE Exponent exponent_of(float gamma) {
  return gamma == 0.0f   ? Exponent::kZero
         : gamma == 1.0f ? Exponent::kOne
         : gamma == 2.0f ? Exponent::kTwo
                         : Exponent::kAny;
}

// base ** gamma of 0 <= base <= 1, whose natural logarithm is at hand.
MG_OPS_INLINE float power(Exponent exponent, float base, float log_base, float gamma) {
  switch (exponent) {
    case Exponent::kZero: return 1.0f;
    case Exponent::kOne: return base;
    case Exponent::kTwo: return base * base;
    default: return det_exp(gamma * log_base);
  }
}

// The loss of a class that is not the anchor's, and its derivative; the weight is left to the caller.
template <Exponent exponent>
MG_OPS_INLINE float negative_loss(float x, float gamma) {
  const Sigmoid sigmoid = sigmoid_of(x);
  return power(exponent, sigmoid.p, sigmoid.log_p, gamma) * -sigmoid.log_one_minus_p;
}

template <Exponent exponent>
MG_OPS_INLINE float negative_gradient(float x, float gamma) {
  const Sigmoid sigmoid = sigmoid_of(x);
  const float modulator = power(exponent, sigmoid.p, sigmoid.log_p, gamma);
  return modulator * (sigmoid.p - gamma * (sigmoid.one_minus_p * sigmoid.log_one_minus_p));
}

// The loss at an anchor's label, target t > 0, and its derivative.
struct LossAndGradient {
  float loss, gradient;
};

MG_OPS_INLINE LossAndGradient positive_loss(float x, float t, const ClassLossParams& params) {
  const Sigmoid sigmoid = sigmoid_of(x);
  const float gamma = params.positive_gamma;
  const bool hard = t == 1.0f;
  const float distance = hard ? -sigmoid.one_minus_p : sigmoid.p - t;
  const float size = distance < 0.0f ? -distance : distance;
  const float cross_entropy = hard ? -sigmoid.log_p : -(t * sigmoid.log_p + (1.0f - t) * sigmoid.log_one_minus_p);
  const float log_size = hard ? sigmoid.log_one_minus_p : size > 0.0f ? det_log2(size) * 0.693147181f : -kMaxFloat;
  const float modulator = power(exponent_of(gamma), size, log_size, gamma);
  // The derivative of size ** gamma; 0 where the target is met.
  const float slope = size >= kMinNormal ? gamma * modulator * (sigmoid.p * sigmoid.one_minus_p / distance) : 0.0f;
  const float weight = params.weigh_by_target ? params.positive_weight * t : params.positive_weight;
  return {weight * modulator * cross_entropy, weight * (modulator * distance + slope * cross_entropy)};
}

}  // namespace mg_ops
