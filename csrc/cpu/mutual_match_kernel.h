// What the CPU kernels of mutual matching take and offer; no torch here.
//
// mutual_match_kernel.cpp is compiled once for each instruction set (MG_OPS_CPU_TARGET names it), and mutual_match.cpp
// picks one of the resulting `MatchKernels` when it runs.
#pragma once

#include "load_integer.h"

namespace mg_ops {

// Boxes are handled in tiles of 64: structure of arrays, so that loops over a tile become vector instructions, with the
// box around them all and the range of their areas, so that a tile too far from an object, or of boxes too small or too
// large for it, costs one comparison.
constexpr int64_t kTileSize = 64;

struct TileBounds {
  Box bounds;
  float min_area, max_area;
};

struct alignas(64) BoxTile : TileBounds {
  float max_width, max_height, magnitude;  // of anchors only: the largest sides, and a bound of all coordinates
  alignas(64) float x1[kTileSize], y1[kTileSize], x2[kTileSize], y2[kTileSize], area[kTileSize];
};

struct ImageWork;  // scratch of one image at a time

// The steps of an image, in the order they run. Those with a tile range may run in parallel for parts of the range;
// each must have ended before the next begins. `false` means out of memory.
struct MatchKernels {
  const char* name;
  void (*load_anchor_tiles)(const MatchProblem&, int64_t tile_begin, int64_t tile_end, BoxTile* tiles);
  ImageWork* (*create_work)(const MatchProblem&, const BoxTile* anchor_tiles_or_null);
  void (*destroy_work)(ImageWork*);
  bool (*begin_image)(ImageWork&, int64_t image);
  void (*claim_by_anchors)(ImageWork&, int64_t tile_begin, int64_t tile_end);
  bool (*finish_claim_by_anchors)(ImageWork&);
  void (*claim_by_regressed)(ImageWork&, int64_t tile_begin, int64_t tile_end);
  void (*finish_claim_by_regressed)(ImageWork&);
  void (*claim_by_amplified)(ImageWork&, int64_t tile_begin, int64_t tile_end);
  void (*finish_claim_by_amplified)(ImageWork&);
};

namespace baseline {
MatchKernels match_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
MatchKernels match_kernels();
}
namespace avx512 {
MatchKernels match_kernels();
}
#endif

}  // namespace mg_ops
