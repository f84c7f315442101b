// exp, log2 and sigmoid that give the same bits everywhere.
//
// Each is one fixed polynomial in plain float32 multiplies, adds and bit operations, every operation rounded on its
// own. mg_ops/reference.py (eager PyTorch) and mg_ops/triton/det_math.py spell out the same operations in the same
// order: change one and you change all three. Compile with floating-point contraction off (g++ -ffp-contract=off, nvcc
// -fmad=false): a fused multiply-add would change the last bit. Coefficients: minimax fits in 40-digit arithmetic,
// relative error of the polynomials 3.1e-9 (exp) and 5.8e-9 (log), rounded to float32.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MG_OPS_INLINE static __host__ __device__ __forceinline__
#else
// `static` gives every object file its own copy: the same source is compiled for several instruction sets, and the
// linker must never hand the AVX2 copy to a processor without AVX2.
#define MG_OPS_INLINE static inline __attribute__((always_inline))
#endif

namespace mg_ops {

constexpr float kMaxFloat = 3.402823466e+38f;
constexpr float kMinNormal = 1.175494351e-38f;

MG_OPS_INLINE uint32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

MG_OPS_INLINE float bits_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// Finite: neither infinite nor NaN.
MG_OPS_INLINE bool is_finite(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }

// 2**n * e**r, with n in the low bits of `shifted` (which is 1.5 * 2^23 + n) and r within half of ln 2.
MG_OPS_INLINE float det_exp_reduced(float r, float shifted) {
  float p = 0.0013814540579915047f;
  p = p * r + 0.00836874544620514f;
  p = p * r + 0.04166838899254799f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  p = (p * (r * r) + r) + 1.0f;
  // 2^n in two factors: n reaches 128 and -151, one float's exponent does not.
  const int32_t exponent = static_cast<int32_t>(float_bits(shifted) - 0x4b400000u);
  const int32_t half = exponent >> 1;
  const float scale_1 = bits_float(static_cast<uint32_t>(half + 127) << 23);
  const float scale_2 = bits_float(static_cast<uint32_t>(exponent - half + 127) << 23);
  return (p * scale_1) * scale_2;
}

// e**x. inf above 88.73, 0 below -104, subnormals in between, NaN for NaN.
MG_OPS_INLINE float det_exp(float x) {
  x = x > 89.0f ? 89.0f : x;  // written so that NaN passes through
  x = x < -104.5f ? -104.5f : x;
  // Adding 1.5 * 2^23 rounds to an integer n and leaves n in the low bits, so no float-to-int conversion of a NaN
  // occurs.
  const float shifted = x * 1.442695041f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // r = x - n ln 2, with ln 2 in two parts; n * 0.693359375 is exact.
  return det_exp_reduced((x - n * 0.693359375f) - n * -2.12194440e-4f, shifted);
}

// exponent + log2(1 + f), with f from sqrt(1/2) - 1 to sqrt(2) - 1.
MG_OPS_INLINE float det_log2_reduced(float f, int32_t exponent) {
  float p = -0.07634482532739639f;
  p = p * f + 0.12761959433555603f;
  p = p * f + -0.1316036432981491f;
  p = p * f + 0.14201720058918f;
  p = p * f + -0.1662333607673645f;
  p = p * f + 0.20001228153705597f;
  p = p * f + -0.250008225440979f;
  p = p * f + 0.3333333134651184f;
  const float f2 = f * f;
  const float tail = p * (f2 * f) - f2 * 0.5f;  // ln(1 + f) - f
  const float log2_m = f * 1.442695041f + tail * 1.442695041f;
  return log2_m + static_cast<float>(exponent);
}

// log2(x) of a finite x > 0, subnormals included; exactly +0 at 1.
MG_OPS_INLINE float det_log2(float x) {
  const bool subnormal = x < kMinNormal;
  const float scaled = subnormal ? x * 8388608.0f : x;  // 2^23
  const uint32_t bits = float_bits(scaled);
  // x = 2^exponent * m, m in [sqrt(1/2), sqrt(2)); 0x3f3504f3 is sqrt(1/2).
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float f = bits_float(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  return det_log2_reduced(f, subnormal ? exponent - 23 : exponent);
}

// 1 / (1 + e**-x), without overflow on either side. NaN for NaN.
MG_OPS_INLINE float det_sigmoid(float x) {
  const float e = det_exp(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

}  // namespace mg_ops
