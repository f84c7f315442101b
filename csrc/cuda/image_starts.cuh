// Where images begin among the packed objects, of whatever offsets there are.
#pragma once

#include "launched_problem.cuh"

namespace mg_ops::cuda {

// Writes where each image's objects begin, (B + 1,): the largest offset so far, clamped to 0 and N. By one warp.
MG_OPS_DEVICE void write_image_starts(const MatchProblem& problem, int32_t* image_starts) {
  uint32_t largest_before = 0;
  for (int64_t first = 0; first <= problem.batch_size; first += 32) {
    const int64_t image = first + lane_index();
    int64_t offset = image <= problem.batch_size ? load_integer(problem.gt_offsets, image) : 0;
    offset = offset < 0 ? 0 : offset > problem.num_gt ? problem.num_gt : offset;
    uint32_t start = static_cast<uint32_t>(offset);
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t below = __shfl_up_sync(kAllLanes, start, distance);
      start = lane_index() >= distance && below > start ? below : start;
    }
    start = start > largest_before ? start : largest_before;
    if (image <= problem.batch_size) {
      image_starts[image] = static_cast<int32_t>(start);
    }
    largest_before = __shfl_sync(kAllLanes, start, 31);
  }
}

}  // namespace mg_ops::cuda
