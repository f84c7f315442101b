// Mutual matching of a batch on a GPU in four launches, for any number of anchors and objects. No torch in here.
//
//   prepare_kernel  bounds of every 64 anchors and of neighboring ones together, and where images begin.
//   object_kernel   a block an object: all that needs no predicted box. Its best anchors, and the list of its pairs.
//   claim_kernel    a warp 64 anchors of an image: the only pass over predicted boxes. Writes the background, and
//                   appends each anchor to its owner's list if it could be chosen.
//   rank_kernel     a block an object and task: forced pairs, counts, the ranking of its lists, and the labels.
//
// Nothing waits for another block. What is equal from run to run: every result is a maximum of integer keys, a count,
// or a choice by unique keys, so the order in which blocks run does not matter, nor that of a list.
//
// Most pairs cost nothing: an object meets 64 neighboring anchors at a time, by bounds on their IoU, and only where
// they allow a quality that matters is it looked at anchor by anchor. Scores are read for pairs only whose q_anchor
// could be amplified far enough: q <= q_amplified <= q ** ((sigma - 1) / sigma).
#pragma once

#include "claim_kernel.cuh"
#include "object_kernel.cuh"
#include "prepare_kernel.cuh"
#include "rank_kernel.cuh"

namespace mg_ops::cuda {

// Calls launch(grid_x, grid_y, threads, kernel) for each kernel, in order. The grids depend on the sizes alone, so that
// a captured graph can be replayed with other objects.
template <typename LaunchKernel>
void launch_mutual_match(const LaunchedProblem& problem, LaunchKernel launch) {
  constexpr int64_t kMostByY = 65535;  // blocks a GPU takes in that direction
  const int64_t num_tiles = (problem.num_anchors + kTile - 1) / kTile;
  const int64_t tile_blocks = (num_tiles + kWarps - 1) / kWarps;
  if (problem.num_gt > 0) {
    launch(tile_blocks + 1, 1, kThreads, prepare_kernel);
    launch(problem.num_gt, 1, kObjectThreads, object_kernel);
  }
  if (problem.batch_size > 0 && num_tiles > 0) {
    launch(problem.batch_size, tile_blocks < kMostByY ? tile_blocks : kMostByY, kThreads, claim_kernel);
    if (problem.num_gt > 0) {
      launch(problem.num_gt, 2, kRankThreads, rank_kernel);
    }
  }
}

}  // namespace mg_ops::cuda
