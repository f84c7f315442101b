// The floating types of tensors, read as float32 and written from it. Part of each kernel source.
#pragma once

#include "../problem.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace mg_ops {
namespace MG_OPS_CPU_TARGET {
namespace {

// Definition arithmetic needs subnormals and round-to-nearest; a caller may have switched them off for this thread.
class DefaultFloatEnvironment {
 public:
#if defined(__SSE2__)
  DefaultFloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatEnvironment() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~DefaultFloatEnvironment() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
  DefaultFloatEnvironment() {}
#endif
};

MG_OPS_INLINE float to_float(float x) { return x; }
MG_OPS_INLINE float to_float(double x) { return static_cast<float>(x); }

struct BFloat16 {
  uint16_t bits;
};
MG_OPS_INLINE float to_float(BFloat16 x) { return bfloat16_to_float(x.bits); }

struct Float16 {
  uint16_t bits;
};
MG_OPS_INLINE float to_float(Float16 x) { return float16_to_float(x.bits); }

// Calls f with a typed pointer to the array's first element.
template <class F>
MG_OPS_INLINE auto with_type(const FloatInput& array, F f) {
  switch (array.type) {
    case FloatType::kFloat16: return f(static_cast<const Float16*>(array.data));
    case FloatType::kBFloat16: return f(static_cast<const BFloat16*>(array.data));
    case FloatType::kFloat64: return f(static_cast<const double*>(array.data));
    default: return f(static_cast<const float*>(array.data));
  }
}

MG_OPS_INLINE float load_float(const FloatInput& array, int64_t offset) {
  return with_type(array, [=](auto* data) { return to_float(data[offset]); });
}

MG_OPS_INLINE void from_float(float x, float& output) { output = x; }
MG_OPS_INLINE void from_float(float x, double& output) { output = static_cast<double>(x); }
MG_OPS_INLINE void from_float(float x, BFloat16& output) { output.bits = float_to_bfloat16(x); }
MG_OPS_INLINE void from_float(float x, Float16& output) { output.bits = float_to_float16(x); }

// Writes numbers to a contiguous tensor of a type, from element `first` on.
template <class Number>
static void store_numbers(const float* input, int64_t count, Number* output) {
  for (int64_t i = 0; i < count; ++i) {  // vector loop
    from_float(input[i], output[i]);
  }
}

MG_OPS_INLINE void store_floats(const float* input, int64_t count, FloatType type, void* output, int64_t first) {
  switch (type) {
    case FloatType::kFloat16: return store_numbers(input, count, static_cast<Float16*>(output) + first);
    case FloatType::kBFloat16: return store_numbers(input, count, static_cast<BFloat16*>(output) + first);
    case FloatType::kFloat64: return store_numbers(input, count, static_cast<double*>(output) + first);
    default: return store_numbers(input, count, static_cast<float*>(output) + first);
  }
}

}  // namespace
}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
