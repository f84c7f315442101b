// What the threads of a ranking block do together: finding the k-th largest of many 64-bit keys.
#pragma once

#include "launched_problem.cuh"

namespace mg_ops::cuda {

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;

struct SelectShared {
  uint32_t warp_low[kRankWarps], warp_high[kRankWarps];
  uint32_t histogram[kDigits];
  uint32_t digit, digit_count, rank;
};

MG_OPS_DEVICE uint32_t warp_inclusive_sum(uint32_t value) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, value, distance);
    value += lane_index() >= distance ? below : 0;
  }
  return value;
}

// Every thread must call it.
MG_OPS_DEVICE Word64 block_or(Word64 value, SelectShared& shared) {
  const uint32_t low = __reduce_or_sync(kAllLanes, static_cast<uint32_t>(value));
  const uint32_t high = __reduce_or_sync(kAllLanes, static_cast<uint32_t>(value >> 32));
  if (lane_index() == 0) {
    shared.warp_low[warp_index()] = low;
    shared.warp_high[warp_index()] = high;
  }
  __syncthreads();
  uint32_t all_low = 0, all_high = 0;
  for (int warp = 0; warp < kRankWarps; ++warp) {
    all_low |= shared.warp_low[warp];
    all_high |= shared.warp_high[warp];
  }
  return (static_cast<Word64>(all_high) << 32) | all_low;
}

// A threshold that exactly `rank` (1 or more) of the `count` keys reach; equal ones stand or fall together. key(i) is
// the key number i; they must not all be equal. Every thread must call it, after a barrier behind the writes of the
// keys.
//
// Radix selection from the highest bit in which any two keys differ: a histogram of the next digit among the keys that
// agree with the threshold so far says which digit it has. It ends as soon as a whole bin is wanted.
template <typename Key>
MG_OPS_DEVICE Word64 select_threshold(const Key& key, uint32_t count, uint32_t rank, SelectShared& shared) {
  const Word64 first_key = key(0);
  Word64 difference = 0;
  for (uint32_t i = threadIdx.x; i < count; i += kRankThreads) {
    difference |= key(i) ^ first_key;
  }
  difference = block_or(difference, shared);
  int shift = 64 - __clzll(static_cast<long long>(difference));  // all keys agree in the bits from here on
  Word64 threshold = shift == 64 ? 0 : (first_key >> shift) << shift;
  while (shift > 0) {
    const int next = shift > kDigitBits ? shift - kDigitBits : 0;
    const uint32_t mask = (1u << (shift - next)) - 1;
    for (uint32_t digit = threadIdx.x; digit < kDigits; digit += kRankThreads) {
      shared.histogram[digit] = 0;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < count; i += kRankThreads) {
      const Word64 mine = key(i);
      const Word64 above = shift == 64 ? 0 : (mine ^ threshold) >> shift;
      if (above == 0) {
        atomicAdd(&shared.histogram[static_cast<uint32_t>(mine >> next) & mask], 1u);
      }
    }
    __syncthreads();
    // The first warp counts down from the largest digit: each lane has kDigits / 32 of them.
    if (warp_index() == 0) {
      constexpr int kPerLane = kDigits / 32;
      const int largest = kDigits - 1 - lane_index() * kPerLane;
      uint32_t sum = 0;
      for (int i = 0; i < kPerLane; ++i) {
        sum += shared.histogram[largest - i];
      }
      uint32_t larger = warp_inclusive_sum(sum) - sum;
      if (larger < rank && rank <= larger + sum) {
        int digit = largest;
        for (; larger + shared.histogram[digit] < rank; --digit) {
          larger += shared.histogram[digit];
        }
        shared.digit = static_cast<uint32_t>(digit);
        shared.digit_count = shared.histogram[digit];
        shared.rank = rank - larger;
      }
    }
    __syncthreads();
    threshold |= static_cast<Word64>(shared.digit) << next;
    rank = shared.rank;
    if (rank == shared.digit_count) {
      break;
    }
    shift = next;
    // The next writes of `shared` come after the barrier that follows the clearing of the histogram.
  }
  return threshold;
}

}  // namespace mg_ops::cuda
