// The first launch: what does not depend on predictions or objects. The anchors as all later launches read them, their
// bounds, and where images begin.
#pragma once

#include "launched_problem.cuh"

namespace mg_ops::cuda {

MG_OPS_DEVICE int64_t clamp_offset(const LaunchedProblem& problem, int64_t image) {
  const int64_t offset = load_integer(problem.gt_offsets, image);
  return offset < 0 ? 0 : offset > problem.num_gt ? problem.num_gt : offset;
}

// Writes image_starts: the largest clamped offset so far. By one warp.
MG_OPS_DEVICE void write_image_starts(const LaunchedProblem& problem) {
  uint32_t largest_before = 0;
  for (int64_t first = 0; first <= problem.batch_size; first += 32) {
    const int64_t image = first + lane_index();
    uint32_t start = image <= problem.batch_size ? static_cast<uint32_t>(clamp_offset(problem, image)) : 0;
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t below = __shfl_up_sync(kAllLanes, start, distance);
      start = lane_index() >= distance && below > start ? below : start;
    }
    start = start > largest_before ? start : largest_before;
    if (image <= problem.batch_size) {
      problem.image_starts[image] = static_cast<int32_t>(start);
    }
    largest_before = __shfl_sync(kAllLanes, start, 31);
  }
}

// A warp a tile, and one more.
__global__ void __launch_bounds__(kThreads, 4) prepare_kernel(const __grid_constant__ LaunchedProblem problem) {
  const uint32_t warp = blockIdx.x * kWarps + static_cast<uint32_t>(warp_index());
  if (warp == 0) {
    write_image_starts(problem);
    if (lane_index() < 2) {
      problem.taken[lane_index()] = 0;
    }
  } else if (warp <= count_tiles(problem)) {
    const uint32_t tile = warp - 1;
    TileBounds bounds = no_bounds();
    for (uint32_t slot = 0; slot < 2; ++slot) {
      const uint32_t anchor = tile * kTile + slot * 32 + static_cast<uint32_t>(lane_index());
      if (anchor < static_cast<uint32_t>(problem.num_anchors)) {
        const Box box = finite_or_empty(load_row(problem.anchors, 0, anchor));
        problem.anchor_boxes[anchor] = {box.x1, box.y1, box.x2, box.y2};
        widen(bounds, box, box_area(box));
      }
    }
    bounds = warp_bounds(bounds);
    if (lane_index() == 0) {
      problem.anchor_tiles[tile] = bounds;
    }
  }
}

}  // namespace mg_ops::cuda
