// Sums of many numbers in one order, so that they are equal from run to run: each block adds up its own, then one block
// adds up what they found.
#pragma once

#include <cstdint>

#include "strided_input.cuh"

#ifndef MG_OPS_SHARED
#define MG_OPS_SHARED(Type, name) __shared__ Type name
#endif

namespace mg_ops::cuda {

constexpr int kLossThreads = 256;

struct SumShared {
  double values[kLossThreads];
};

// The sum over the threads of a block; valid in thread 0. Every thread must call it.
MG_OPS_DEVICE double block_sum(double value, SumShared& shared) {
  shared.values[threadIdx.x] = value;
  for (int distance = kLossThreads / 2; distance > 0; distance /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < distance) {
      shared.values[threadIdx.x] += shared.values[threadIdx.x + distance];
    }
  }
  return shared.values[0];
}

// By one block.
static __global__ void __launch_bounds__(kLossThreads)
    sum_kernel(const double* block_sums, int64_t count, float* result) {
  MG_OPS_SHARED(SumShared, shared);
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kLossThreads) {
    sum += block_sums[i];
  }
  const double total = block_sum(sum, shared);
  if (threadIdx.x == 0) {
    *result = static_cast<float>(total);
  }
}

}  // namespace mg_ops::cuda
