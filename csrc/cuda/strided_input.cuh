// Reading the inputs where they lie: any strides, any floating dtype, rounded to float32 on the way in.
#pragma once

#include <cstdint>

#include "../problem.h"

#define MG_OPS_DEVICE static __device__ __forceinline__

namespace mg_ops::cuda {

MG_OPS_DEVICE float load_float(const FloatInput& input, int64_t element) {
  switch (input.type) {
    case FloatType::kFloat16: return float16_to_float(__ldg(static_cast<const uint16_t*>(input.data) + element));
    case FloatType::kBFloat16: return bfloat16_to_float(__ldg(static_cast<const uint16_t*>(input.data) + element));
    case FloatType::kFloat32: return __ldg(static_cast<const float*>(input.data) + element);
    default: return static_cast<float>(__ldg(static_cast<const double*>(input.data) + element));
  }
}

// Four neighboring numbers from an element on, which lies at a multiple of four loads.
MG_OPS_DEVICE Box load_four(const FloatInput& input, int64_t element) {
  if (input.type == FloatType::kFloat32) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(input.data) + element));
    return {four.x, four.y, four.z, four.w};
  }
  if (input.type == FloatType::kFloat64) {
    const double2* pairs = reinterpret_cast<const double2*>(static_cast<const double*>(input.data) + element);
    const double2 low = __ldg(pairs), high = __ldg(pairs + 1);
    return {static_cast<float>(low.x), static_cast<float>(low.y), static_cast<float>(high.x),
            static_cast<float>(high.y)};
  }
  const uint2 bits = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(input.data) + element));
  if (input.type == FloatType::kFloat16) {
    return {float16_to_float(bits.x & 0xffffu), float16_to_float(bits.x >> 16), float16_to_float(bits.y & 0xffffu),
            float16_to_float(bits.y >> 16)};
  }
  return {bfloat16_to_float(bits.x & 0xffffu), bfloat16_to_float(bits.x >> 16), bfloat16_to_float(bits.y & 0xffffu),
          bfloat16_to_float(bits.y >> 16)};
}

// Four numbers of a row: a box, or the deltas of one.
MG_OPS_DEVICE Box load_row(const FloatInput& input, int64_t image, int64_t row) {
  const int64_t first = image * input.image_stride + row * input.row_stride;
  if (input.whole_rows) {
    return load_four(input, first);
  }
  return {load_float(input, first), load_float(input, first + input.column_stride),
          load_float(input, first + 2 * input.column_stride), load_float(input, first + 3 * input.column_stride)};
}

MG_OPS_DEVICE int64_t load_integer(const IntegerInput& input, int64_t index) {
  return input.is_int64 ? __ldg(static_cast<const int64_t*>(input.data) + index * input.stride)
                        : static_cast<int64_t>(__ldg(static_cast<const int32_t*>(input.data) + index * input.stride));
}

// Writes neighbors of a contiguous tensor; four at once from a multiple of four on.
MG_OPS_DEVICE void store_numbers(FloatType type, void* output, int64_t first, int count, const float* numbers) {
  const auto bits = [&](int i) -> uint32_t {
    return type == FloatType::kFloat16 ? float_to_float16(numbers[i]) : float_to_bfloat16(numbers[i]);
  };
  if (type == FloatType::kFloat32) {
    float* const place = static_cast<float*>(output) + first;
    if (count == 4) {
      *reinterpret_cast<float4*>(place) = float4{numbers[0], numbers[1], numbers[2], numbers[3]};
    } else {
      *place = numbers[0];
    }
  } else if (type == FloatType::kFloat64) {
    double* const place = static_cast<double*>(output) + first;
    for (int i = 0; i < count; ++i) {
      place[i] = static_cast<double>(numbers[i]);
    }
  } else {
    uint16_t* const place = static_cast<uint16_t*>(output) + first;
    if (count == 4) {
      *reinterpret_cast<uint2*>(place) = uint2{bits(0) | (bits(1) << 16), bits(2) | (bits(3) << 16)};
    } else {
      *place = static_cast<uint16_t>(bits(0));
    }
  }
}

}  // namespace mg_ops::cuda
