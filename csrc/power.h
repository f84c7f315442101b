// Powers, logarithms and angles that give the same bits everywhere; mg_ops/rules/eager/arithmetic.py spells out the
// same operations.
#pragma once

#include <cmath>

#include "det_math.h"

namespace mg_ops {

MG_OPS_INLINE float square_root(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return sqrtf(x);
#endif
}

// An exponent >= 0, and how x**exponent is made: with halves >= 0 as a product, exponent = halves / 2.
struct Exponent {
  float value;
  int32_t halves;
};

inline Exponent make_exponent(float value) {
  const float halves = 2.0f * value;
  const bool whole = halves <= 16.0f && halves == static_cast<float>(static_cast<int32_t>(halves));
  return {value, whole ? static_cast<int32_t>(halves) : -1};
}

// The power that is no product.
MG_OPS_INLINE float power_by_logarithm(float x, float exponent) {
  const float positive = x > 0.0f ? x : 1.0f;
  const float result = det_exp((det_log2(positive) * 0.69314718f) * exponent);
  return x > 0.0f ? (result < 1.0f ? result : 1.0f) : 0.0f;
}

// x**exponent of x >= 0: never above 1 for x <= 1, and never smaller for a larger x where it is a product.
MG_OPS_INLINE float power(float x, Exponent exponent) {
  if (exponent.halves < 0) {
    return power_by_logarithm(x, exponent.value);
  }
  float result = 1.0f, square = x;
  for (int32_t whole = exponent.halves / 2; whole > 0; whole /= 2) {
    result = whole % 2 == 1 ? result * square : result;
    square = square * square;
  }
  return exponent.halves % 2 == 1 ? result * square_root(x) : result;
}

// atan(x) of x >= 0, infinity included: the polynomial of Cephes.
MG_OPS_INLINE float det_atan(float x) {
  const bool steep = x > 2.4142135623730950f, middle = x > 0.41421356237309503f;
  const float base = steep ? 1.5707963267948966f : middle ? 0.78539816339744831f : 0.0f;
  x = (steep ? -1.0f : middle ? x - 1.0f : x) / (steep ? x : middle ? x + 1.0f : 1.0f);
  const float z = x * x;
  float p = 0.0805374449538f;
  p = p * z + -0.138776856032f;
  p = p * z + 0.199777106478f;
  p = p * z + -0.333329491539f;
  return ((p * z) * x + x) + base;
}

// ln(1 + x) of x from -1 to 1, exact to the last bits near 0; meaningless at -1.
MG_OPS_INLINE float det_log1p(float x) {
  const uint32_t bits = float_bits(1.0f + x);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float f = bits_float(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  return det_log2_reduced(exponent == 0 ? x : f, exponent) * 0.69314718f;
}

// 10**x. inf above 38.54, 0 below -45.4, NaN for NaN.
MG_OPS_INLINE float det_exp10(float x) {
  x = x > 38.65f ? 38.65f : x;
  x = x < -45.5f ? -45.5f : x;
  const float shifted = x * 3.321928095f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  return det_exp_reduced(((x - n * 0.30078125f) - n * 2.48745664e-4f) * 2.302585093f, shifted);
}

}  // namespace mg_ops
