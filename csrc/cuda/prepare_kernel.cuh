// The first launch: what does not depend on predictions or objects. The anchors as all later launches read them, their
// bounds, and where images begin.
#pragma once

#include "image_starts.cuh"
#include "launched_problem.cuh"

namespace mg_ops::cuda {

MG_OPS_DEVICE float center_distance(const Box& a, const Box& b) {
  return fabsf((a.x1 + a.x2) - (b.x1 + b.x2)) + fabsf((a.y1 + a.y2) - (b.y1 + b.y2));
}

// Writes a tile's anchors and its bounds, cut in two at the largest step from one anchor to the next if that makes them
// much smaller. Returns the bounds of the whole tile. By one warp.
MG_OPS_DEVICE TileBounds prepare_tile(const LaunchedProblem& problem, uint32_t tile) {
  const uint32_t lane = static_cast<uint32_t>(lane_index());
  Box box[2] = {};
#pragma unroll
  for (uint32_t slot = 0; slot < 2; ++slot) {
    const uint32_t anchor = tile * kTile + slot * 32 + lane;
    if (anchor < static_cast<uint32_t>(problem.num_anchors)) {
      box[slot] = finite_or_empty(load_row(problem.anchors, 0, anchor));
      problem.anchor_boxes[anchor] = {box[slot].x1, box[slot].y1, box[slot].x2, box[slot].y2};
    }
  }

  uint32_t step[2];  // to each anchor from the one before it
#pragma unroll
  for (uint32_t slot = 0; slot < 2; ++slot) {
    Box before{__shfl_up_sync(kAllLanes, box[slot].x1, 1), __shfl_up_sync(kAllLanes, box[slot].y1, 1),
               __shfl_up_sync(kAllLanes, box[slot].x2, 1), __shfl_up_sync(kAllLanes, box[slot].y2, 1)};
    step[slot] = lane == 0 ? 0 : float_bits(center_distance(before, box[slot]));
  }
  const Box last{__shfl_sync(kAllLanes, box[0].x1, 31), __shfl_sync(kAllLanes, box[0].y1, 31),
                 __shfl_sync(kAllLanes, box[0].x2, 31), __shfl_sync(kAllLanes, box[0].y2, 31)};
  step[1] = lane == 0 ? float_bits(center_distance(last, box[1])) : step[1];
  const uint32_t largest = __reduce_max_sync(kAllLanes, step[0] > step[1] ? step[0] : step[1]);
  const uint32_t split = __reduce_min_sync(kAllLanes, step[0] == largest   ? lane
                                                      : step[1] == largest ? 32 + lane
                                                                           : kTile);

  TileBounds first = no_bounds(), second = no_bounds();
#pragma unroll
  for (uint32_t slot = 0; slot < 2; ++slot) {
    widen(first, box[slot], box_area(box[slot]), slot * 32 + lane < split);
    widen(second, box[slot], box_area(box[slot]), slot * 32 + lane >= split);
  }
  first = warp_bounds(first);
  second = warp_bounds(second);
  TileBounds both = first;
  both.box = {min_float(first.box.x1, second.box.x1), min_float(first.box.y1, second.box.y1),
              max_float(first.box.x2, second.box.x2), max_float(first.box.y2, second.box.y2)};
  both.least_area = min_float(first.least_area, second.least_area);
  both.most_area = max_float(first.most_area, second.most_area);
  first.split = split;
  const bool cut = box_area(first.box) + box_area(second.box) < 0.75f * box_area(both.box);
  if (lane == 0) {
    problem.anchor_tiles[2 * tile] = cut ? first : both;
    problem.anchor_tiles[2 * tile + 1] = second;
  }
  return both;
}

struct PrepareShared {
  TileBounds tiles[kWarps];
};

// A block a group of tiles, a warp a tile; and one block more.
__global__ void __launch_bounds__(kThreads, 4) prepare_kernel(const __grid_constant__ LaunchedProblem problem) {
  MG_OPS_SHARED(PrepareShared, shared);
  const uint32_t group = blockIdx.x;
  if (group == count_tile_groups(problem)) {
    if (warp_index() == 0) {
      write_image_starts(problem, problem.image_starts);
      if (lane_index() < 2) {
        problem.taken[lane_index()] = 0;
      }
    }
    return;
  }
  const uint32_t tile = group * kGroupTiles + static_cast<uint32_t>(warp_index());
  const TileBounds bounds = tile < count_tiles(problem) ? prepare_tile(problem, tile) : no_bounds();
  if (lane_index() == 0) {
    shared.tiles[warp_index()] = bounds;
  }
  __syncthreads();
  if (warp_index() == 0) {
    const TileBounds all = warp_bounds(lane_index() < kWarps ? shared.tiles[lane_index()] : no_bounds());
    if (lane_index() == 0) {
      problem.anchor_groups[group] = all;
    }
  }
}

}  // namespace mg_ops::cuda
