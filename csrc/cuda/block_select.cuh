// What the threads of one block do together: prefix sums, and finding the k-th largest of a list of 64-bit keys.
#pragma once

#include <cstdint>

#include "strided_input.cuh"

// Threads of a block. Every block handles this many anchors, and stages this many objects at a time.
#ifndef MG_OPS_CUDA_THREADS
#define MG_OPS_CUDA_THREADS 256
#endif
// The longest list whose keys are kept in shared memory while they are ranked; longer ones are ranked where they lie.
#ifndef MG_OPS_CUDA_STAGED_KEYS
#define MG_OPS_CUDA_STAGED_KEYS 1024
#endif

namespace mg_ops::cuda {

// The type CUDA's 64-bit atomics and shuffles are declared with.
using Word64 = unsigned long long;

constexpr int kThreads = MG_OPS_CUDA_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kStagedKeys = MG_OPS_CUDA_STAGED_KEYS;
static_assert(kThreads % 32 == 0 && kWarps <= 32, "a block is whole warps, and one warp can hold a value of each");

struct BlockScratch {
  Word64 warp_value[kWarps];
  uint32_t histogram[kDigits];
  uint32_t digit, digit_count, rank;
};

MG_OPS_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) & 31; }
MG_OPS_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) >> 5; }

MG_OPS_DEVICE Word64 warp_inclusive_sum(Word64 value) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const Word64 below = __shfl_up_sync(kAllLanes, value, distance);
    value += lane_index() >= distance ? below : 0;
  }
  return value;
}

// The sum of the values of all threads before this one; `total` becomes that of the block. Every thread must call it.
MG_OPS_DEVICE Word64 block_exclusive_sum(Word64 value, Word64& total, BlockScratch& scratch) {
  const Word64 inclusive = warp_inclusive_sum(value);
  if (lane_index() == 31) {
    scratch.warp_value[warp_index()] = inclusive;
  }
  __syncthreads();
  Word64 before = 0;
  total = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    before += warp < warp_index() ? scratch.warp_value[warp] : 0;
    total += scratch.warp_value[warp];
  }
  __syncthreads();
  return before + inclusive - value;
}

MG_OPS_DEVICE Word64 block_or(Word64 value, BlockScratch& scratch) {
  const uint32_t low = __reduce_or_sync(kAllLanes, static_cast<uint32_t>(value));
  const uint32_t high = __reduce_or_sync(kAllLanes, static_cast<uint32_t>(value >> 32));
  if (lane_index() == 0) {
    scratch.warp_value[warp_index()] = (static_cast<Word64>(high) << 32) | low;
  }
  __syncthreads();
  Word64 all = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    all |= scratch.warp_value[warp];
  }
  __syncthreads();
  return all;
}

// A threshold that exactly `rank` (1 or more) of the `count` keys reach, if keys differ; equal ones stand or fall
// together. Every thread must call it, after a barrier behind the writes of the keys.
//
// Radix selection from the highest bit in which any two keys differ: a histogram of the next digit among the keys that
// agree with the threshold so far says which digit it has. It ends as soon as a whole bin is wanted.
MG_OPS_DEVICE Word64 select_threshold(const Word64* keys, uint32_t count, uint32_t rank, BlockScratch& scratch) {
  const Word64 first_key = keys[0];
  Word64 difference = 0;
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    difference |= keys[i] ^ first_key;
  }
  difference = block_or(difference, scratch);
  int shift = 64 - __clzll(static_cast<long long>(difference));  // all keys agree in the bits from here on
  if (shift == 0) {
    return first_key;
  }
  Word64 threshold = shift == 64 ? 0 : (first_key >> shift) << shift;
  while (shift > 0) {
    const int next = shift > kDigitBits ? shift - kDigitBits : 0;
    const uint32_t mask = (1u << (shift - next)) - 1;
    for (uint32_t digit = threadIdx.x; digit < kDigits; digit += kThreads) {
      scratch.histogram[digit] = 0;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      const Word64 key = keys[i];
      const Word64 above = shift == 64 ? 0 : (key ^ threshold) >> shift;
      if (above == 0) {
        atomicAdd(&scratch.histogram[static_cast<uint32_t>(key >> next) & mask], 1u);
      }
    }
    __syncthreads();
    // The first warp counts down from the largest digit: each lane has kDigits / 32 of them.
    if (warp_index() == 0) {
      constexpr int kPerLane = kDigits / 32;
      const int largest = kDigits - 1 - lane_index() * kPerLane;
      uint32_t sum = 0;
      for (int i = 0; i < kPerLane; ++i) {
        sum += scratch.histogram[largest - i];
      }
      uint32_t larger = static_cast<uint32_t>(warp_inclusive_sum(sum)) - sum;
      if (larger < rank && rank <= larger + sum) {
        int digit = largest;
        for (; larger + scratch.histogram[digit] < rank; --digit) {
          larger += scratch.histogram[digit];
        }
        scratch.digit = static_cast<uint32_t>(digit);
        scratch.digit_count = scratch.histogram[digit];
        scratch.rank = rank - larger;
      }
    }
    __syncthreads();
    threshold |= static_cast<Word64>(scratch.digit) << next;
    rank = scratch.rank;
    const bool whole_bin = rank == scratch.digit_count;
    __syncthreads();
    if (whole_bin) {
      break;
    }
    shift = next;
  }
  return threshold;
}

}  // namespace mg_ops::cuda
