// Numbers that carry their derivatives with respect to four inputs, so that a formula written once also gives its
// gradient (forward-mode differentiation).
#pragma once

#include <cmath>

#include "det_math.h"

namespace mg_ops {

struct Dual {
  float value;
  float slopes[4];
};

MG_OPS_INLINE Dual constant(float value) { return {value, {0.0f, 0.0f, 0.0f, 0.0f}}; }
MG_OPS_INLINE Dual variable(float value, int number) {
  Dual x = constant(value);
  x.slopes[number] = 1.0f;
  return x;
}

// f(a, b) where df = slope_a * da + slope_b * db.
MG_OPS_INLINE Dual chain(float value, const Dual& a, float slope_a, const Dual& b, float slope_b) {
  Dual result{};
  result.value = value;
  for (int i = 0; i < 4; ++i) {
    result.slopes[i] = slope_a * a.slopes[i] + slope_b * b.slopes[i];
  }
  return result;
}
MG_OPS_INLINE Dual chain(float value, const Dual& a, float slope) { return chain(value, a, slope, a, 0.0f); }

MG_OPS_INLINE Dual operator+(const Dual& a, const Dual& b) { return chain(a.value + b.value, a, 1.0f, b, 1.0f); }
MG_OPS_INLINE Dual operator-(const Dual& a, const Dual& b) { return chain(a.value - b.value, a, 1.0f, b, -1.0f); }
MG_OPS_INLINE Dual operator*(const Dual& a, const Dual& b) { return chain(a.value * b.value, a, b.value, b, a.value); }
MG_OPS_INLINE Dual operator/(const Dual& a, const Dual& b) {
  const float ratio = a.value / b.value;
  return chain(ratio, a, 1.0f / b.value, b, -ratio / b.value);
}
MG_OPS_INLINE Dual operator+(const Dual& a, float b) { return chain(a.value + b, a, 1.0f); }
MG_OPS_INLINE Dual operator*(float a, const Dual& b) { return chain(a * b.value, b, a); }
MG_OPS_INLINE Dual operator-(float a, const Dual& b) { return chain(a - b.value, b, -1.0f); }

MG_OPS_INLINE Dual exponential(const Dual& a) {
  const float value = det_exp(a.value);
  return chain(value, a, value);
}
MG_OPS_INLINE Dual arctangent(const Dual& a) { return chain(atanf(a.value), a, 1.0f / (1.0f + a.value * a.value)); }

// Where both are equal each gets half of the slope, as in torch.
MG_OPS_INLINE Dual smaller(const Dual& a, const Dual& b) {
  const float of_a = a.value < b.value ? 1.0f : a.value > b.value ? 0.0f : 0.5f;
  return chain(a.value < b.value ? a.value : b.value, a, of_a, b, 1.0f - of_a);
}
MG_OPS_INLINE Dual larger(const Dual& a, const Dual& b) {
  const float of_a = a.value > b.value ? 1.0f : a.value < b.value ? 0.0f : 0.5f;
  return chain(a.value > b.value ? a.value : b.value, a, of_a, b, 1.0f - of_a);
}

}  // namespace mg_ops
