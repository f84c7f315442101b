// What the kernels of the rules share in which each object selects its best anchors: the anchors as points in groups of
// 32, and a block an object that finds the k best.
#pragma once

#include "../ranked.h"
#include "rule_objects.cuh"

namespace mg_ops::cuda::rules {

// A group is 32 neighboring anchors, one a lane.
struct RankedScratch : ObjectScratch {
  Box* groups;  // (A / 32) rounded up: the box around the centers of each group
};

inline void place_ranked(Placing& placing, RankedScratch& scratch, const MatchProblem& problem) {
  place_objects(placing, scratch, problem);
  placing.place(scratch.groups, problem.num_gt > 0 ? (problem.num_anchors + 31) / 32 : 0);
}

MG_OPS_DEVICE uint32_t count_groups(const MatchProblem& problem) {
  return (static_cast<uint32_t>(problem.num_anchors) + 31) / 32;
}

MG_OPS_DEVICE Point load_point(const MatchProblem& problem, uint32_t anchor) {
  return anchor < problem.num_anchors ? box_center(load_row(problem.anchors, 0, anchor)) : kNowhere;
}

MG_OPS_DEVICE bool is_somewhere(Point point) { return point.x != kNowhere.x || point.y != kNowhere.y; }

// Whether a point within bounds can be inside of a box.
MG_OPS_DEVICE bool can_be_inside(const Box& bounds, const Box& box) {
  return bounds.x1 < box.x2 && bounds.x2 > box.x1 && bounds.y1 < box.y2 && bounds.y2 > box.y1;
}

// A warp a group: its bounds. Every thread of a block of the first count_groups / kWarps blocks must call it.
MG_OPS_DEVICE void prepare_groups(const MatchProblem& problem, const RankedScratch& scratch) {
  const uint32_t group = blockIdx.x * kWarps + static_cast<uint32_t>(warp_index());
  if (group >= count_groups(problem)) {
    return;
  }
  const Point point = load_point(problem, group * 32 + static_cast<uint32_t>(lane_index()));
  const Box bounds = warp_bounds({point.x, point.y, point.x, point.y}, is_somewhere(point));
  if (lane_index() == 0) {
    scratch.groups[group] = bounds;
  }
}

// Adds up the sums that a sum is made of, one a lane of each half of a warp. Every lane must call it.
MG_OPS_DEVICE float add_lanes(float sum) {
  static_assert(kSumLanes == 16, "half a warp");
  for (int distance = 8; distance > 0; distance /= 2) {
    sum += __shfl_sync(kAllLanes, sum, lane_index() ^ distance);
  }
  return sum;
}

// The image of an object; batch_size for one past the last offset.
MG_OPS_DEVICE uint32_t image_of(const MatchProblem& problem, const ObjectScratch& scratch, uint32_t object) {
  uint32_t low = 0, high = static_cast<uint32_t>(problem.batch_size);
  while (low < high) {  // the first image that ends behind the object
    const uint32_t middle = low + (high - low) / 2;
    if (static_cast<uint32_t>(scratch.image_starts[middle + 1]) > object) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const bool has = low < problem.batch_size && static_cast<uint32_t>(scratch.image_starts[low]) <= object;
  return has ? low : static_cast<uint32_t>(problem.batch_size);
}

struct SelectedShared {
  Word64 keys[kWarps][kMaxK];
  uint32_t size[kWarps];
};

// The k best keys that a warp has seen.
struct WarpBest {
  uint32_t size;
  Word64 floor;  // no key up to this one can be among them
};

// The smallest of a list's k keys. Every lane must call it.
MG_OPS_DEVICE Word64 smallest_key(const Word64* keys, uint32_t k) {
  Word64 smallest = ~Word64{0};
  for (uint32_t i = static_cast<uint32_t>(lane_index()); i < k; i += 32) {
    smallest = keys[i] < smallest ? keys[i] : smallest;
  }
  const uint32_t order = __reduce_min_sync(kAllLanes, key_order(smallest));
  const uint32_t low = key_order(smallest) == order ? static_cast<uint32_t>(smallest) : 0xffffffffu;
  return (static_cast<Word64>(order) << 32) | __reduce_min_sync(kAllLanes, low);
}

// Adds a key of each lane, 0 for none. Every lane must call it.
MG_OPS_DEVICE void add_keys(WarpBest& best, Word64* keys, uint32_t k, Word64 key) {
  for (uint32_t left = __ballot_sync(kAllLanes, key > best.floor); left != 0; left &= left - 1) {
    const Word64 added = __shfl_sync(kAllLanes, key, __ffs(static_cast<int>(left)) - 1);
    if (added <= best.floor) {
      continue;  // it has risen meanwhile
    }
    if (best.size < k) {
      if (lane_index() == 0) {
        keys[best.size] = added;
      }
      ++best.size;
    } else {  // keys differ: one lane finds the smallest
      for (uint32_t i = static_cast<uint32_t>(lane_index()); i < k; i += 32) {
        if (keys[i] == best.floor) {
          keys[i] = added;
        }
      }
    }
    __syncwarp();
    if (best.size == k) {
      best.floor = smallest_key(keys, k);
      __syncwarp();
    }
  }
}

// The k best anchors of an object, by one block: calls visit(key, rank) by some thread for each of them.
// is_near(group) is asked a lane each; key_of(anchor, floor) is claim_key(quality, anchor), or 0 where that is no
// candidate or not above the floor. Returns how many there are. Every thread of the block must call it.
template <class IsNear, class KeyOf, class Visit>
MG_OPS_DEVICE uint32_t for_best_of_groups(const MatchProblem& problem, uint32_t k, SelectedShared& shared,
                                          IsNear is_near, KeyOf key_of, Visit visit) {
  WarpBest best{0, 0};
  Word64* keys = shared.keys[warp_index()];
  const uint32_t num_groups = count_groups(problem);
  // Neighboring groups go to different warps: the near ones lie together.
  for (uint32_t first = 0; first < num_groups; first += kThreads) {
    const uint32_t own = first + static_cast<uint32_t>(lane_index() * kWarps + warp_index());
    const bool near = own < num_groups && is_near(own);
    for (uint32_t left = __ballot_sync(kAllLanes, near); left != 0; left &= left - 1) {
      const uint32_t lane = static_cast<uint32_t>(__ffs(static_cast<int>(left))) - 1;
      const uint32_t group = first + lane * kWarps + static_cast<uint32_t>(warp_index());
      const uint32_t anchor = group * 32 + static_cast<uint32_t>(lane_index());
      add_keys(best, keys, k, anchor < problem.num_anchors ? key_of(anchor, best.floor) : 0);
    }
  }
  if (lane_index() == 0) {
    shared.size[warp_index()] = best.size;
  }
  __syncthreads();
  uint32_t count = 0;
  for (uint32_t warp = 0; warp < kWarps; ++warp) {
    count += shared.size[warp];
  }
  for (uint32_t place = threadIdx.x; place < kWarps * k; place += kThreads) {
    const uint32_t own_warp = place / k, i = place % k;
    if (i >= shared.size[own_warp]) {
      continue;
    }
    const Word64 key = shared.keys[own_warp][i];
    uint32_t rank = 0;
    for (uint32_t warp = 0; warp < kWarps; ++warp) {
      for (uint32_t j = 0; j < shared.size[warp]; ++j) {
        rank += shared.keys[warp][j] > key ? 1 : 0;
      }
    }
    if (rank < k) {
      visit(key, rank);
    }
  }
  return count < k ? count : k;
}

// The same where is_near(bounds) is asked of the centers of a group.
template <class IsNear, class KeyOf, class Visit>
MG_OPS_DEVICE uint32_t for_best(const MatchProblem& problem, const RankedScratch& scratch, uint32_t k,
                                SelectedShared& shared, IsNear is_near, KeyOf key_of, Visit visit) {
  return for_best_of_groups(
      problem, k, shared, [&](uint32_t group) { return is_near(scratch.groups[group]); }, key_of, visit);
}

}  // namespace mg_ops::cuda::rules
