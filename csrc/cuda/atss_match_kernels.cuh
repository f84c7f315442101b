// ATSS of a batch on a GPU in three launches, for any number of anchors and objects. No torch in here.
//
//   prepare_kernel  reads the objects, bounds groups of anchors, and empties the claims.
//   select_kernel   a block an object: a warp a level finds its candidates, and the positives among them it claims.
//   label_kernel    a thread an anchor: its label.
//
// Every result is a maximum of integer keys or a count, so the order in which blocks run does not matter.
#pragma once

#include "../atss.h"
#include "ranked.cuh"

namespace mg_ops::cuda::rules::atss {

// The match holds the claims between the launches. A group is up to 32 neighboring anchors of a level, one a lane.
struct LaunchedAtss : AtssProblem {
  ObjectScratch scratch;
  Box* groups;                          // the box around the centers of each
  int32_t group_begin[kMaxLevels + 1];  // groups [group_begin[l], group_begin[l + 1]) are of level l
};

// As max_iou_match_kernels.cuh's: 40 bytes an object, half a byte an anchor, and the offsets.
inline size_t place_scratch(LaunchedAtss& problem, char* memory) {
  for (int32_t level = 0; level < problem.num_levels; ++level) {
    const int32_t size = problem.level_begin[level + 1] - problem.level_begin[level];
    problem.group_begin[level + 1] = problem.group_begin[level] + size / 32 + (size % 32 != 0 ? 1 : 0);
  }
  Placing placing{memory};
  place_objects(placing, problem.scratch, problem);
  placing.place(problem.groups, problem.num_gt > 0 ? problem.group_begin[problem.num_levels] : 0);
  return placing.bytes;
}

// One integer that compares as (distance, then index): the larger key wins. Neither 0 nor ~0 is one.
MG_OPS_DEVICE Word64 near_key(uint32_t distance, uint32_t index) { return claim_key(0xfffffffeu - distance, index); }

// The candidates of an object, level by level, the nearest first.
struct Candidates {
  Word64 keys[kMaxCandidates];  // near_key of each
  float iou[kMaxCandidates];
};

MG_OPS_DEVICE Word64* claim_of(const MatchProblem& problem, uint32_t image, uint32_t anchor) {
  return reinterpret_cast<Word64*>(problem.cls_match + static_cast<int64_t>(image) * problem.num_anchors + anchor);
}

// --- prepare ---------------------------------------------------------------------------------------------------------

// The anchor of a lane in a group of a level; num_anchors where it has none.
MG_OPS_DEVICE uint32_t anchor_of(const LaunchedAtss& problem, int32_t level, uint32_t group) {
  const uint32_t in_level = (group - static_cast<uint32_t>(problem.group_begin[level])) * 32;
  const uint32_t anchor = static_cast<uint32_t>(problem.level_begin[level]) + in_level + lane_index();
  return anchor < static_cast<uint32_t>(problem.level_begin[level + 1]) ? anchor
                                                                        : static_cast<uint32_t>(problem.num_anchors);
}

// A warp a group: its bounds.
MG_OPS_DEVICE void prepare_level_groups(const LaunchedAtss& problem) {
  const uint32_t group = blockIdx.x * kWarps + static_cast<uint32_t>(warp_index());
  if (group >= static_cast<uint32_t>(problem.group_begin[problem.num_levels])) {
    return;
  }
  int32_t level = 0;
  while (group >= static_cast<uint32_t>(problem.group_begin[level + 1])) {
    ++level;
  }
  const Point point = load_point(problem, anchor_of(problem, level, group));
  const Box bounds = warp_bounds({point.x, point.y, point.x, point.y}, is_somewhere(point));
  if (lane_index() == 0) {
    problem.groups[group] = bounds;
  }
}

__global__ void __launch_bounds__(kThreads, 4) prepare_kernel(const __grid_constant__ LaunchedAtss problem) {
  prepare_objects(problem, problem.scratch);
  prepare_level_groups(problem);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < problem.batch_size * problem.num_anchors) {
    problem.cls_match[index] = 0;
  }
}

// --- select ----------------------------------------------------------------------------------------------------------

// The nearest anchors of a level that a warp has seen, in a list sorted from the largest key on.
struct WarpNearest {
  Word64* keys;
  uint32_t wanted, size;
  Word64 floor;  // no key up to this one can be among them
};

// Merges a key of each lane, 0 for none, into the list. Every lane must call it.
MG_OPS_DEVICE void merge_keys(WarpNearest& nearest, Word64 key) {
  const uint32_t added = __ballot_sync(kAllLanes, key > nearest.floor);
  if (added == 0) {
    return;
  }
  // A key's place in the merged list: how many keys of the group and of the list are larger.
  constexpr uint32_t kPerLane = kMaxK / 32;
  Word64 listed[kPerLane];
  uint32_t listed_place[kPerLane], place = 0;
  for (uint32_t i = 0; i < kPerLane; ++i) {
    listed_place[i] = 32 * i + static_cast<uint32_t>(lane_index());
    listed[i] = listed_place[i] < nearest.size ? nearest.keys[listed_place[i]] : ~Word64{0};
  }
  for (uint32_t left = added; left != 0; left &= left - 1) {
    const Word64 other = __shfl_sync(kAllLanes, key, __ffs(static_cast<int>(left)) - 1);
    place += other > key ? 1 : 0;
    for (uint32_t i = 0; i < kPerLane; ++i) {
      listed_place[i] += other > listed[i] ? 1 : 0;
    }
  }
  uint32_t low = 0, high = nearest.size;
  while (low < high) {  // the first of the list that is smaller
    const uint32_t middle = (low + high) / 2;
    if (nearest.keys[middle] > key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  place += low;
  __syncwarp();  // all have read the list
  for (uint32_t i = 0; i < kPerLane; ++i) {
    if (32 * i + static_cast<uint32_t>(lane_index()) < nearest.size && listed_place[i] < nearest.wanted) {
      nearest.keys[listed_place[i]] = listed[i];
    }
  }
  if (key > nearest.floor && place < nearest.wanted) {
    nearest.keys[place] = key;
  }
  const uint32_t size = nearest.size + static_cast<uint32_t>(__popc(added));
  nearest.size = size < nearest.wanted ? size : nearest.wanted;
  __syncwarp();
  if (nearest.size == nearest.wanted) {
    nearest.floor = nearest.keys[nearest.wanted - 1];
  }
  __syncwarp();  // all have read the floor
}

MG_OPS_DEVICE void visit_group(const LaunchedAtss& problem, int32_t level, uint32_t group, Point center,
                               WarpNearest& nearest) {
  const uint32_t anchor = anchor_of(problem, level, group);
  const Point point = load_point(problem, anchor);
  const uint32_t distance = distance_order(point.x - center.x, point.y - center.y);
  merge_keys(nearest, anchor < problem.num_anchors ? near_key(distance, anchor) : 0);
}

// The largest of the lanes' keys, 0 if none has any. Every lane must call it.
MG_OPS_DEVICE Word64 largest_key(Word64 key) {
  const uint32_t order = __reduce_max_sync(kAllLanes, key_order(key));
  const uint32_t low = __reduce_max_sync(kAllLanes, key_order(key) == order ? static_cast<uint32_t>(key) : 0);
  return (static_cast<Word64>(order) << 32) | low;
}

// Finds the candidates of a level by one warp. Groups compare by near_key of their least distance.
MG_OPS_DEVICE void find_nearest(const LaunchedAtss& problem, int32_t level, Point center, WarpNearest& nearest) {
  const uint32_t begin = static_cast<uint32_t>(problem.group_begin[level]);
  const uint32_t end = static_cast<uint32_t>(problem.group_begin[level + 1]);
  const auto group_key = [&](uint32_t group) -> Word64 {
    return group < end ? near_key(least_distance_order(center, problem.groups[group]), group) : 0;
  };
  // The nearest groups, until there are as many anchors as wanted.
  Word64 last_visited = ~Word64{0};
  while (nearest.size < nearest.wanted) {
    Word64 next = 0;
    for (uint32_t first = begin; first < end; first += 32) {
      const Word64 key = group_key(first + static_cast<uint32_t>(lane_index()));
      next = key < last_visited && key > next ? key : next;
    }
    last_visited = largest_key(next);
    visit_group(problem, level, key_index(last_visited), center, nearest);
  }
  // Then any other that is not farther than the farthest of these.
  for (uint32_t first = begin; first < end; first += 32) {
    const Word64 key = group_key(first + static_cast<uint32_t>(lane_index()));
    const auto may_be_near = [&] { return key < last_visited && key_order(key) >= key_order(nearest.floor); };
    for (uint32_t left = __ballot_sync(kAllLanes, may_be_near()); left != 0;) {
      const uint32_t lane = static_cast<uint32_t>(__ffs(static_cast<int>(left))) - 1;
      visit_group(problem, level, first + lane, center, nearest);
      left = __ballot_sync(kAllLanes, may_be_near()) & left & (left - 1);  // the floor may have risen
    }
  }
}

__global__ void __launch_bounds__(kThreads, 4) select_kernel(const __grid_constant__ LaunchedAtss problem) {
  MG_OPS_SHARED(Candidates, shared);
  const Object object = problem.scratch.objects[blockIdx.x];
  const uint32_t image = image_of(problem, problem.scratch, blockIdx.x);
  if (object.kind != ObjectKind::kObject || image == problem.batch_size) {
    return;
  }
  int32_t first = 0;
  for (int32_t level = 0; level < problem.num_levels; ++level) {
    const int32_t wanted = candidates_of_level(problem, level);
    if (level % kWarps == warp_index() && wanted > 0) {
      WarpNearest nearest{shared.keys + first, static_cast<uint32_t>(wanted), 0, 0};
      find_nearest(problem, level, object_center(object.box), nearest);
    }
    first += wanted;
  }
  __syncthreads();
  const int32_t count = first;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads) {
    const Box box = finite_or_empty(load_row(problem.anchors, 0, key_index(shared.keys[i])));
    shared.iou[i] = box_iou(box, box_area(box), object.box, object.area);
  }
  __syncthreads();
  const float threshold = mean_plus_deviation(shared.iou, count, [](const float* iou, int32_t size, auto value) {
    float sum = 0.0f;
    for (int32_t i = lane_index() % 16; i < size; i += static_cast<int32_t>(kSumLanes)) {
      sum += value(iou[i]);
    }
    return add_lanes(sum);
  });
  const uint32_t index = blockIdx.x - static_cast<uint32_t>(problem.scratch.image_starts[image]);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads) {
    const uint32_t anchor = key_index(shared.keys[i]);
    if (reaches(shared.iou[i], threshold) &&
        passes_center_test(problem, load_row(problem.anchors, 0, anchor), object.box)) {
      atomicMax(claim_of(problem, image, anchor), static_cast<Word64>(claim_key(iou_order(shared.iou[i]), index)));
    }
  }
}

// --- label -----------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads, 4) label_kernel(const __grid_constant__ LaunchedAtss problem) {
  MG_OPS_SHARED(StagedObjects, shared);
  const uint32_t blocks = blocks_an_image(problem);
  const uint32_t image = blockIdx.x / blocks;
  const uint32_t anchor = (blockIdx.x % blocks) * kThreads + threadIdx.x;
  const bool exists = anchor < problem.num_anchors;
  const int64_t place = static_cast<int64_t>(image) * problem.num_anchors + anchor;
  if (problem.num_gt == 0) {  // the other kernels did not run
    if (exists) {
      __stcs(problem.cls_match + place, kBackground);
    }
    return;
  }
  const ImageObjects objects = objects_of(problem.scratch, image);
  bool covered = false;
  if (problem.gt_crowd != nullptr) {
    const Box box = exists ? finite_or_empty(load_row(problem.anchors, 0, anchor)) : Box{};
    const float area = box_area(box);
    const Box bounds = warp_bounds(box, has_size(box));
    for_objects(
        problem.scratch, objects, shared,
        [&](const Object& object, uint32_t) {
          return object.kind == ObjectKind::kCrowd && can_overlap(bounds, object.box);
        },
        [&](const Object& object, uint32_t) {
          covered |= positive_ratio(intersection_area(box, object.box), area) >= problem.crowd_overlap;
        });
  }
  if (!exists) {
    return;
  }
  const Word64 claim = static_cast<Word64>(problem.cls_match[place]);
  if (claim != 0) {
    __stcs(problem.cls_match + place, static_cast<int64_t>(key_index(claim)));
    atomicAdd(problem.num_pos + objects.first + key_index(claim), 1);
  } else {
    __stcs(problem.cls_match + place, covered ? kIgnored : kBackground);
  }
}

// Calls launch(grid, kernel) for each kernel, in order. The grids depend on the sizes alone.
template <typename LaunchKernel>
void launch_atss_match(const LaunchedAtss& problem, LaunchKernel launch) {
  const int64_t num_places = problem.batch_size * problem.num_anchors;
  if (problem.num_gt > 0) {
    const int64_t num_groups = problem.group_begin[problem.num_levels];
    const int64_t most = problem.num_gt > num_places ? problem.num_gt : num_places;
    const int64_t thread_blocks = (most + kThreads - 1) / kThreads;
    const int64_t warp_blocks = (num_groups + kWarps - 1) / kWarps;
    launch(thread_blocks > warp_blocks ? thread_blocks : warp_blocks, prepare_kernel);
    if (num_places > 0) {
      launch(problem.num_gt, select_kernel);
    }
  }
  if (num_places > 0) {
    launch(problem.batch_size * ((problem.num_anchors + kThreads - 1) / kThreads), label_kernel);
  }
}

}  // namespace mg_ops::cuda::rules::atss
