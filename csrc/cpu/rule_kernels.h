// What the CPU kernels of a rule offer to run_rule.h; no torch here. Like those of mutual matching they are compiled
// once for each instruction set.
#pragma once

#include "mutual_match_kernel.h"

namespace mg_ops {

// A step of an image, for a range of its tiles; the parts of a range may run in parallel.
using TileStep = void (*)(ImageWork&, int64_t tile_begin, int64_t tile_end);
// A step of a whole image. `false` means out of memory.
using ImageStep = bool (*)(ImageWork&);

// One of the two, or the end of the steps.
struct RuleStep {
  TileStep for_tiles;
  ImageStep for_image;
};

struct RuleKernels {
  void (*load_anchor_tiles)(const MatchProblem&, int64_t tile_begin, int64_t tile_end, BoxTile* tiles);
  ImageWork* (*create_work)(const MatchProblem&, const BoxTile* anchor_tiles_or_null);
  void (*destroy_work)(ImageWork*);
  bool (*begin_image)(ImageWork&, int64_t image);
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
