// What the CPU kernels of a rule take, and what they offer to run_rule.h; no torch here.
//
// The source of a rule's kernels is compiled once for each instruction set (MG_OPS_CPU_TARGET names it); which of them
// runs is decided when it does.
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

// A step of an image, for a range of its tiles; the parts of a range may run in parallel.
using TileStep = void (*)(ImageWork&, int64_t tile_begin, int64_t tile_end);
// A step of a whole image. `false` means out of memory.
using ImageStep = bool (*)(ImageWork&);
// A step for a range of the image's slots, its valid objects; the parts of a range may run in parallel.
using SlotStep = void (*)(ImageWork&, int64_t slot_begin, int64_t slot_end);

// One of the three, or the end of the steps.
struct RuleStep {
  TileStep for_tiles = nullptr;
  ImageStep for_image = nullptr;
  SlotStep for_slots = nullptr;

  bool is_end() const { return for_tiles == nullptr && for_image == nullptr && for_slots == nullptr; }
};

struct RuleKernels {
  void (*load_anchor_tiles)(const MatchProblem&, int64_t tile_begin, int64_t tile_end, BoxTile* tiles);
  ImageWork* (*create_work)(const MatchProblem&, const BoxTile* anchor_tiles_or_null);
  void (*destroy_work)(ImageWork*);
  bool (*begin_image)(ImageWork&, int64_t image);
  int64_t (*count_slots)(const ImageWork&);
  RuleStep steps[8];  // in the order they run: each must have ended before the next begins
};

// The kernels of a rule, of each instruction set.
#if defined(__x86_64__)
#define MG_OPS_DECLARE_RULE_KERNELS(name) \
  namespace baseline {                    \
  RuleKernels name();                     \
  }                                       \
  namespace avx2 {                        \
  RuleKernels name();                     \
  }                                       \
  namespace avx512 {                      \
  RuleKernels name();                     \
  }
#else
#define MG_OPS_DECLARE_RULE_KERNELS(name) \
  namespace baseline {                    \
  RuleKernels name();                     \
  }
#endif

}  // namespace mg_ops
