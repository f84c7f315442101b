// The second launch, a block an object: whether it takes part, its best anchors under q_anchor and q_amplified, the
// list of its pairs, and room for the anchors that claim_kernel will find it to own.
//
// Nothing here depends on predicted boxes, and of the scores only those of pairs are read. Only tiles of anchors are
// looked at whose bounds allow the quality that is looked for.
#pragma once

#include "launched_problem.cuh"

namespace mg_ops::cuda {

struct ObjectShared {
  uint32_t anchor[kListRoom];  // of the pairs, in any order
  uint32_t iou[kListRoom];     // order of q_anchor
  uint32_t num_pairs, num_near, num_far;
  Word64 first_pair;
  uint32_t warp_order[kObjectWarps], warp_anchor[kObjectWarps];
  uint32_t tiles[kObjectThreads * kGroupTiles];  // that are to be looked at, in any order
  uint32_t num_tiles[2];                         // how many: in turns, so that one is cleared while the other is in use
};

// The image of an object, or one that does not exist if no image has it. Every lane must call it.
MG_OPS_DEVICE uint32_t image_of(const LaunchedProblem& problem, uint32_t index) {
  uint32_t begun = 0;  // images that begin at this object or before
  for (int64_t first = 0; first <= problem.batch_size; first += 32) {
    const int64_t image = first + lane_index();
    const bool begins = image <= problem.batch_size && static_cast<uint32_t>(problem.image_starts[image]) <= index;
    const uint32_t there = static_cast<uint32_t>(__popc(__ballot_sync(kAllLanes, begins)));
    begun += there;
    if (there < 32) {
      break;
    }
  }
  return begun - 1;
}

// What a warp knows of the best anchor of an object.
struct BestAnchor {
  uint32_t order, anchor;
};

// The larger order, the lower anchor of equal ones, of all threads of the block; every thread gets it. Every thread
// must call it.
MG_OPS_DEVICE BestAnchor block_best(BestAnchor best, ObjectShared& shared) {
  const auto warp_best = [](BestAnchor mine) {
    const uint32_t order = __reduce_max_sync(kAllLanes, mine.order);
    return BestAnchor{order, __reduce_min_sync(kAllLanes, mine.order == order ? mine.anchor : 0xffffffffu)};
  };
  best = warp_best(best);
  if (lane_index() == 0) {
    shared.warp_order[warp_index()] = best.order;
    shared.warp_anchor[warp_index()] = best.anchor;
  }
  __syncthreads();
  const bool is_one = lane_index() < kObjectWarps;
  const BestAnchor all = warp_best(
      {is_one ? shared.warp_order[lane_index()] : 0, is_one ? shared.warp_anchor[lane_index()] : 0xffffffffu});
  __syncthreads();
  return all;
}

MG_OPS_DEVICE void keep_better(BestAnchor& best, uint32_t order, uint32_t anchor) {
  if (order > best.order || (order == best.order && anchor < best.anchor)) {
    best = {order, anchor};
  }
}

// Adds a lane's anchors, two or fewer, to the shared list. Every lane must call it.
MG_OPS_DEVICE void add_pairs(ObjectShared& shared, const bool adds[2], const uint32_t iou[2], uint32_t first_anchor) {
  const uint32_t low = __ballot_sync(kAllLanes, adds[0]);
  const uint32_t high = __ballot_sync(kAllLanes, adds[1]);
  uint32_t first = 0;
  if (lane_index() == 0) {
    first = atomicAdd(&shared.num_pairs, static_cast<uint32_t>(__popc(low) + __popc(high)));
  }
  first = __shfl_sync(kAllLanes, first, 0);
  const uint32_t places[2] = {first + static_cast<uint32_t>(__popc(low & lower_lanes())),
                              first + static_cast<uint32_t>(__popc(low) + __popc(high & lower_lanes()))};
#pragma unroll
  for (uint32_t slot = 0; slot < 2; ++slot) {
    if (adds[slot] && places[slot] < kListRoom) {
      shared.anchor[places[slot]] = first_anchor + slot * 32 + static_cast<uint32_t>(lane_index());
      shared.iou[places[slot]] = iou[slot];
    }
  }
}

// Lists the tiles of up to kObjectThreads groups whose bounds allow a pair of a quality, and returns how many they are.
// `round` counts the calls. A barrier must come before the next call; every thread must call it.
MG_OPS_DEVICE uint32_t list_tiles(const LaunchedProblem& problem, const Object& object, float sought,
                                  uint32_t first_group, uint32_t round, ObjectShared& shared) {
  uint32_t& num_tiles = shared.num_tiles[round & 1];
  if (threadIdx.x == 0) {
    shared.num_tiles[~round & 1] = 0;
  }
  const float below = just_below(sought);
  // Neighboring groups go to different warps.
  const uint32_t tested = first_group + static_cast<uint32_t>(lane_index() * kObjectWarps + warp_index());
  const bool may_have =
      tested < count_tile_groups(problem) && can_exceed(problem.anchor_groups[tested], object.box, object.area, below);
  // As many groups at a time as have a lane for each tile.
  constexpr uint32_t kAtATime = 32 / kGroupTiles;
  const uint32_t which = static_cast<uint32_t>(lane_index()) / kGroupTiles;
  for (uint32_t left = __ballot_sync(kAllLanes, may_have); left != 0;) {
    uint32_t own = left;
#pragma unroll
    for (uint32_t i = 0; i < kAtATime; ++i) {
      own = i < which ? own & (own - 1) : own;
      left &= left - 1;
    }
    const uint32_t lane = static_cast<uint32_t>(__ffs(static_cast<int>(own))) - 1;
    const uint32_t group = first_group + lane * kObjectWarps + static_cast<uint32_t>(warp_index());
    const uint32_t tile = group * kGroupTiles + static_cast<uint32_t>(lane_index()) % kGroupTiles;
    const bool near =
        own != 0 && tile < count_tiles(problem) && can_exceed(load_tile(problem, tile), object.box, object.area, below);
    const uint32_t near_ones = __ballot_sync(kAllLanes, near);
    uint32_t first = 0;
    if (lane_index() == 0) {
      first = atomicAdd(&num_tiles, static_cast<uint32_t>(__popc(near_ones)));
    }
    first = __shfl_sync(kAllLanes, first, 0);
    if (near) {
      shared.tiles[first + static_cast<uint32_t>(__popc(near_ones & lower_lanes()))] = tile;
    }
  }
  __syncthreads();
  return num_tiles;
}

// Makes room for the anchors that claim_kernel will find the object to own, and looks at the prediction of its best
// anchor. By one thread.
MG_OPS_DEVICE void begin_front(const LaunchedProblem& problem, uint32_t index, const Object& object, BestAnchor best,
                               uint32_t num_pairs) {
  Word64 best_regressed = 0, first_front = 0, front_room = 0;
  float front = common_front_quality(problem);
  if (best.order != 0 && problem.params.classification_by_regressed) {
    // A good lower bound to begin with, so that claim_kernel can leave out most pairs.
    const Box box = load_pred(problem, object.image, best.anchor, load_anchor(problem, best.anchor));
    const float q = box_iou(box, box_area(box), object.box, object.area);
    best_regressed = q > 0.0f ? claim_key(iou_order(q), best.anchor) : 0;
    // Where even this prediction is bad, another object may have the only good one: then worse ones are listed too.
    front = q > 0.0f ? min_float(front, 0.5f * q) : front;
    // Predictions are near their anchors, so about as many of them are near the object: mostly less than twice the
    // pairs, and more where there is room. An object must not take what the others need.
    const Word64 room = static_cast<Word64>(problem.fronts_room);
    const Word64 share = room / static_cast<Word64>(problem.num_gt);
    const Word64 some = 2 * static_cast<Word64>(num_pairs) + 32;
    const Word64 plenty = 3 * static_cast<Word64>(num_pairs) + 128;
    Word64 wanted = some > share / 2 ? some : share / 2;
    wanted = wanted < plenty ? wanted : plenty;
    wanted = wanted < kListRoom ? wanted : kListRoom;
    first_front = atomicAdd(problem.taken + 1, wanted);
    const Word64 left = first_front < room ? room - first_front : 0;
    front_room = wanted < left ? wanted : left;
  }
  problem.best[kByRegressed][index] = best_regressed;
  problem.front_quality[index] = front;
  ObjectLists& lists = problem.lists[index];
  lists.first_front = first_front;
  lists.front_room = static_cast<uint32_t>(front_room);
  lists.num_fronts = 0;
}

// What a pass over the anchors looks for. Nearly all objects need the first pass only: it keeps the pairs of an object
// that has an anchor of iou_positive. Where that finds no anchor, kBest looks for the best. kWeak keeps the pairs that
// matter only to objects whose best anchor is bad. kTooMany amplifies the pairs where they stand, if they were too many
// to keep.
enum Pass : int { kStrong, kBest, kWeak, kTooMany };

// Every thread of a block must call it.
MG_OPS_DEVICE void find_pairs(const LaunchedProblem& problem, uint32_t index, Object& object, ObjectShared& shared) {
  const uint32_t num_groups = count_tile_groups(problem);
  const uint32_t num_anchors = static_cast<uint32_t>(problem.num_anchors);
  const bool amplified = problem.params.localization_by_amplified;
  const uint32_t near_order = iou_order(problem.params.iou_ignored);
  if (threadIdx.x == 0) {
    shared.num_pairs = 0;
    shared.num_near = 0;
    shared.num_far = 0;
    shared.num_tiles[0] = 0;
  }
  __syncthreads();

  BestAnchor best{0, 0xffffffffu}, best_amplified{0, 0xffffffffu};
  const float strong = problem.strong_quality;
  float least = strong;
  uint32_t round = 0;
#pragma unroll 1
  for (int pass = kStrong; pass <= kTooMany; ++pass) {
    const bool runs = pass == kStrong || (pass == kBest && best.order == 0) || (pass == kWeak && least < strong) ||
                      (pass == kTooMany && amplified && shared.num_pairs > kListRoom);
    if (!runs) {
      continue;
    }
    float sought = pass == kBest ? 0.0f : least;
    for (uint32_t first = 0; first < num_groups; first += kObjectThreads) {
      const uint32_t num_tiles = list_tiles(problem, object, sought, first, round++, shared);
      for (uint32_t i = static_cast<uint32_t>(warp_index()); i < num_tiles; i += kObjectWarps) {
        const uint32_t tile = shared.tiles[i];
        // The better the best so far, the fewer tiles can have a better one.
        if (pass == kBest && sought > 0.0f &&
            !can_exceed(load_tile(problem, tile), object.box, object.area, just_below(sought))) {
          continue;
        }
        const uint32_t first_anchor = tile * kTile;
        uint32_t order[2];
#pragma unroll
        for (uint32_t slot = 0; slot < 2; ++slot) {
          const uint32_t anchor = first_anchor + slot * 32 + static_cast<uint32_t>(lane_index());
          order[slot] = 0;
          if (anchor < num_anchors) {
            const Box box = load_anchor(problem, anchor);
            const float q = iou_above(box, box_area(box), object.box, object.area, just_below(sought));
            order[slot] = q >= sought ? iou_order(q) : 0;
          }
        }
        if (__ballot_sync(kAllLanes, (order[0] | order[1]) != 0) == 0) {
          continue;
        }
        if (pass == kStrong || pass == kWeak) {
          const uint32_t too_much = pass == kStrong ? 0xffffffffu : iou_order(strong);
          const bool adds[2] = {order[0] != 0 && order[0] < too_much, order[1] != 0 && order[1] < too_much};
          add_pairs(shared, adds, order, first_anchor);
        }
#pragma unroll
        for (uint32_t slot = 0; slot < 2; ++slot) {
          const uint32_t anchor = first_anchor + slot * 32 + static_cast<uint32_t>(lane_index());
          if (pass == kStrong || pass == kBest) {
            keep_better(best, order[slot], anchor);
          }
          if (pass == kTooMany && order[slot] != 0) {
            const float q = bits_float(order[slot]);
            keep_better(best_amplified, amplified_order(problem, object.image, anchor, object.label, q), anchor);
          }
        }
        if (pass == kBest) {
          sought = bits_float(__reduce_max_sync(kAllLanes, best.order));
        }
      }
      __syncthreads();
    }
    if (pass == kStrong || pass == kBest) {
      best = block_best(best, shared);
      if (best.order != 0 && best.order < iou_order(problem.params.iou_positive)) {
        least = min_float(strong, pair_quality(problem, bits_float(best.order)));
      }
    }
  }

  const uint32_t num_pairs = shared.num_pairs;
  const bool kept = num_pairs <= kListRoom;
  if (threadIdx.x == 0) {
    shared.first_pair = kept ? atomicAdd(problem.taken, static_cast<Word64>(num_pairs)) : 0;
  }
  __syncthreads();
  if (threadIdx.x == kObjectThreads - 1) {  // its warp has the least to do
    begin_front(problem, index, object, best, num_pairs);
  }
  const Word64 first_pair = shared.first_pair;
  const bool fits = kept && first_pair + num_pairs <= static_cast<Word64>(problem.pairs_room);
  for (uint32_t first = 0; kept && first < num_pairs; first += kObjectThreads) {
    const uint32_t i = first + threadIdx.x;
    const bool exists = i < num_pairs;
    const uint32_t anchor = exists ? shared.anchor[i] : 0;
    uint32_t order = exists ? shared.iou[i] : 0;
    // Near pairs from the front of the list, the others from its back.
    const bool is_near = order >= near_order;
    const uint32_t near_ones = __ballot_sync(kAllLanes, exists && is_near);
    const uint32_t far_ones = __ballot_sync(kAllLanes, exists && !is_near);
    uint32_t before = 0;
    if (lane_index() < 2) {
      const uint32_t ones = static_cast<uint32_t>(__popc(lane_index() == 0 ? near_ones : far_ones));
      before = atomicAdd(lane_index() == 0 ? &shared.num_near : &shared.num_far, ones);
    }
    before = __shfl_sync(kAllLanes, before, is_near ? 0 : 1);
    const uint32_t place = before + static_cast<uint32_t>(__popc((is_near ? near_ones : far_ones) & lower_lanes()));
    if (exists) {
      if (amplified) {
        order = amplified_order(problem, object.image, anchor, object.label, bits_float(order));
        keep_better(best_amplified, order, anchor);
      }
      if (fits) {
        problem.pairs[first_pair + (is_near ? place : num_pairs - 1 - place)] = claim_key(order, anchor);
      }
    }
  }
  __syncthreads();  // num_near is complete
  if (amplified) {
    best_amplified = block_best(best_amplified, shared);
  }

  if (threadIdx.x == 0) {
    const bool takes_part = best.order != 0;
    object.kind = takes_part ? ObjectKind::kObject : ObjectKind::kNone;
    problem.objects[index] = object;
    problem.best[kByAnchor][index] = takes_part ? claim_key(best.order, best.anchor) : 0;
    problem.best[kByAmplified][index] =
        amplified && takes_part ? claim_key(best_amplified.order, best_amplified.anchor) : 0;
    ObjectLists& lists = problem.lists[index];
    lists.first_pair = first_pair;
    lists.num_near = shared.num_near;
    lists.num_pairs = fits ? num_pairs : kNoList;
  }
}

// A block an object.
__global__ void __launch_bounds__(kObjectThreads, 2) object_kernel(const __grid_constant__ LaunchedProblem problem) {
  MG_OPS_SHARED(ObjectShared, shared);
  const uint32_t index = blockIdx.x;
  const uint32_t image = image_of(problem, index);

  Object object{};
  const Box box = load_row(problem.gt_boxes, 0, index);
  object.box = finite_or_empty(box);
  object.area = box_area(object.box);
  object.image = image;
  const int64_t label = load_integer(problem.gt_labels, index);
  object.label = label >= 0 && label < problem.num_classes ? static_cast<int32_t>(label) : -1;
  const bool crowd = problem.gt_crowd != nullptr && __ldg(problem.gt_crowd + index * problem.crowd_stride) != 0;
  if (threadIdx.x == 0) {
    problem.num_pos[index] = 0;  // what objects that take no part keep
    problem.num_total[index] = 0;
  }
  // Objects before the first offset or past the last belong to no image.
  if (image < static_cast<uint32_t>(problem.batch_size) && !crowd && is_object(box)) {
    find_pairs(problem, index, object, shared);
  } else if (threadIdx.x == 0) {
    object.kind = crowd ? ObjectKind::kCrowd : ObjectKind::kNone;
    problem.objects[index] = object;
    for (Word64* best : problem.best) {
      best[index] = 0;
    }
    problem.lists[index] = ObjectLists{};
  }
}

}  // namespace mg_ops::cuda
