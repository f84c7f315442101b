// The third launch, the only one that reads all predicted boxes: a warp a tile, two anchors a lane. It writes the
// background, finds the best anchor of each object under q_regressed, and appends each anchor to the front of its owner
// under q_regressed if it could be among those chosen.
//
// Most pairs are left out by bounds of the tile: only a pair matters whose q_regressed reaches its object's
// front_quality or the largest of its object so far, and object_kernel has left a good anchor's there.
#pragma once

#include "launched_problem.cuh"

namespace mg_ops::cuda {

struct ClaimShared {
  Box box[kThreads];
  float area[kThreads];
  uint32_t best[kThreads];  // order of the largest q_regressed that was known when the objects were copied
  float sought[kThreads];   // pairs below this are left out
  ObjectKind kind[kThreads];
};

// Copies the objects of an image from number `first_object` on, as many as fit. Returns whether one is a crowd region.
// Every thread must call it.
MG_OPS_DEVICE bool stage_objects(const LaunchedProblem& problem, ImageObjects objects, uint32_t first_object,
                                 ClaimShared& shared) {
  __syncthreads();  // all are done with what was staged before
  const uint32_t number = first_object + threadIdx.x;
  bool crowd = false;
  if (number < objects.count) {
    const uint32_t index = objects.first + number;
    const Object object = problem.objects[index];
    const uint32_t best = key_order(load_relaxed(problem.best[kByRegressed] + index));
    shared.box[threadIdx.x] = object.box;
    shared.area[threadIdx.x] = object.area;
    shared.best[threadIdx.x] = best;
    shared.sought[threadIdx.x] =
        object.kind == ObjectKind::kObject ? min_float(bits_float(best), problem.front_quality[index]) : 0.0f;
    shared.kind[threadIdx.x] = object.kind;
    crowd = object.kind == ObjectKind::kCrowd;
  }
  return __syncthreads_or(crowd) != 0;
}

// Raises the best pair of an object to the largest order in the warp, at the lowest anchor that has it. Every lane must
// call it.
MG_OPS_DEVICE void raise_best(Word64* best, const uint32_t order[2], uint32_t first_anchor, uint32_t least) {
  const uint32_t largest = __reduce_max_sync(kAllLanes, order[0] > order[1] ? order[0] : order[1]);
  if (largest == 0 || largest < least) {
    return;
  }
  const uint32_t low = __ballot_sync(kAllLanes, order[0] == largest);
  const uint32_t high = __ballot_sync(kAllLanes, order[1] == largest);
  if (lane_index() == 0) {
    const uint32_t offset = low != 0 ? static_cast<uint32_t>(__ffs(static_cast<int>(low))) - 1
                                     : static_cast<uint32_t>(__ffs(static_cast<int>(high))) + 31;
    atomicMax(best, static_cast<Word64>(claim_key(largest, first_anchor + offset)));
  }
}

// Appends an anchor to the front of its owner, once a warp and owner. Every lane must call it.
MG_OPS_DEVICE void append_front(const LaunchedProblem& problem, uint32_t image_start, bool appends, uint32_t owner,
                                uint32_t order, uint32_t anchor) {
  const uint32_t same = __match_any_sync(kAllLanes, appends ? owner : 0xffffffffu);
  const int leader = __ffs(static_cast<int>(same)) - 1;
  ObjectLists* lists = problem.lists + image_start + owner;
  uint32_t first = 0;
  if (appends && lane_index() == leader) {
    first = atomicAdd(&lists->num_fronts, static_cast<uint32_t>(__popc(same)));
  }
  first = __shfl_sync(kAllLanes, first, leader);
  const uint32_t place = first + static_cast<uint32_t>(__popc(same & lower_lanes()));
  if (appends && place < lists->front_room) {
    problem.fronts[lists->first_front + place] = claim_key(order, anchor);
  }
}

// The claims of a tile's predicted boxes, and which of its anchors are covered by a crowd region: bit 0 and bit 1 of
// the result are for the lane's two. Every thread of a block must call it, with a tile that exists or not.
MG_OPS_DEVICE uint32_t claim_tile(const LaunchedProblem& problem, uint32_t image, ImageObjects objects, uint32_t tile,
                                  ClaimShared& shared) {
  const uint32_t num_anchors = static_cast<uint32_t>(problem.num_anchors);
  const uint32_t first_anchor = tile * kTile;
  const bool by_regressed = problem.params.classification_by_regressed;

  Box anchor_box[2], pred_box[2];
  float pred_area[2];
  SplitBounds bounds{no_bounds(), no_bounds()};
  const uint32_t split = first_anchor < num_anchors ? problem.anchor_tiles[2 * tile].split : kTile;
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const uint32_t anchor = first_anchor + static_cast<uint32_t>(slot * 32 + lane_index());
    anchor_box[slot] = pred_box[slot] = Box{};
    if (anchor < num_anchors) {
      anchor_box[slot] = load_anchor(problem, anchor);
      if (by_regressed) {
        pred_box[slot] = load_pred(problem, image, anchor, anchor_box[slot]);
      }
    }
    pred_area[slot] = box_area(pred_box[slot]);
    const bool in_first = static_cast<uint32_t>(slot * 32 + lane_index()) < split;
    widen(bounds.first, pred_box[slot], pred_area[slot], in_first);
    widen(bounds.second, pred_box[slot], pred_area[slot], !in_first);
  }
  if (by_regressed) {
    bounds.first = warp_bounds(bounds.first);
    bounds.first.split = split;
    if (split < kTile) {
      bounds.second = warp_bounds(bounds.second);
    }
    if (lane_index() == 0 && first_anchor < num_anchors) {
      const Box first = bounds.first.box, second = bounds.second.box;
      problem.pred_tiles[static_cast<int64_t>(image) * count_tiles(problem) + tile] = {
          min_float(first.x1, second.x1), min_float(first.y1, second.y1), max_float(first.x2, second.x2),
          max_float(first.y2, second.y2)};
    }
  }

  uint32_t order[2] = {0, 0}, owner[2] = {0, 0};
  uint32_t covered = 0;
  for (uint32_t first = 0; first < objects.count; first += kThreads) {
    const bool crowds = stage_objects(problem, objects, first, shared);
    const uint32_t staged = objects.count - first < kThreads ? objects.count - first : kThreads;
    for (uint32_t group = 0; group < staged; group += 32) {
      const uint32_t tested = group + static_cast<uint32_t>(lane_index());
      const ObjectKind kind = tested < staged ? shared.kind[tested] : ObjectKind::kNone;
      const bool may_claim =
          by_regressed && kind == ObjectKind::kObject &&
          can_exceed(bounds, shared.box[tested], shared.area[tested], just_below(shared.sought[tested]));
      for (uint32_t left = __ballot_sync(kAllLanes, may_claim); left != 0; left &= left - 1) {
        const uint32_t place = group + static_cast<uint32_t>(__ffs(static_cast<int>(left))) - 1;
        const Box box = shared.box[place];
        const float area = shared.area[place];
        const float sought = shared.sought[place];
        uint32_t order_here[2];
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
          order_here[slot] = iou_order(iou_above(pred_box[slot], pred_area[slot], box, area, just_below(sought)));
          // Objects come in ascending order, so that on ties the lowest stays.
          if (order_here[slot] > order[slot]) {
            order[slot] = order_here[slot];
            owner[slot] = first + place;
          }
        }
        raise_best(problem.best[kByRegressed] + objects.first + first + place, order_here, first_anchor,
                   shared.best[place]);
      }
      if (crowds) {
        for (uint32_t left = __ballot_sync(kAllLanes, kind == ObjectKind::kCrowd); left != 0; left &= left - 1) {
          const Box box = shared.box[group + static_cast<uint32_t>(__ffs(static_cast<int>(left))) - 1];
#pragma unroll
          for (int slot = 0; slot < 2; ++slot) {
            const float coverage = positive_ratio(intersection_area(anchor_box[slot], box), box_area(anchor_box[slot]));
            covered |= coverage >= problem.params.crowd_overlap ? 1u << slot : 0;
          }
        }
      }
    }
  }

#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const bool appends =
        order[slot] != 0 && order[slot] >= iou_order(problem.front_quality[objects.first + owner[slot]]);
    if (__ballot_sync(kAllLanes, appends) != 0) {
      const uint32_t anchor = first_anchor + static_cast<uint32_t>(slot * 32 + lane_index());
      append_front(problem, objects.first, appends, owner[slot], order[slot], anchor);
    }
  }
  return covered;
}

// A warp a tile of an image: images are numbered by x, so that tiles of the same anchors run together, and tiles by y.
__global__ void __launch_bounds__(kThreads, 4) claim_kernel(const __grid_constant__ LaunchedProblem problem) {
  MG_OPS_SHARED(ClaimShared, shared);
  const uint32_t image = blockIdx.x;
  const ImageObjects objects = objects_of(problem, image);
  const uint32_t num_anchors = static_cast<uint32_t>(problem.num_anchors);
  const uint32_t num_tiles = count_tiles(problem);
  for (uint32_t first_tile = blockIdx.y * kWarps; first_tile < num_tiles; first_tile += gridDim.y * kWarps) {
    const uint32_t tile = first_tile + static_cast<uint32_t>(warp_index());
    const uint32_t covered = objects.count > 0 ? claim_tile(problem, image, objects, tile, shared) : 0;
    // What an anchor is unless an object chooses it: rank_kernel writes over this.
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const uint32_t anchor = tile * kTile + static_cast<uint32_t>(slot * 32 + lane_index());
      if (anchor < num_anchors) {
        const int64_t place = static_cast<int64_t>(image) * num_anchors + anchor;
        __stcs(problem.cls_match + place, (covered >> slot & 1) != 0 ? kIgnored : kBackground);
        __stcs(problem.loc_match + place, kBackground);
      }
    }
  }
}

}  // namespace mg_ops::cuda
