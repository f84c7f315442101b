// What the CPU kernels of mutual matching take and offer; no torch here.
//
// mutual_match_kernel.cpp is compiled once for each instruction set (MG_OPS_CPU_TARGET names it), and mutual_match.cpp
// picks one of the resulting `MatchKernels` when it runs.
#pragma once

#include "../assignment.h"

namespace mg_ops {

enum class FloatType { kFloat16, kBFloat16, kFloat32, kFloat64 };

// A floating tensor of up to three dimensions read in place: element (i, j, k) is data[i * s0 + j * s1 + k * s2].
struct FloatArray {
  const void* data;
  FloatType type;
  int64_t stride[3];
};

// An int64 or int32 vector read in place.
struct IntArray {
  const void* data;
  bool is_int64;
  int64_t stride;

  int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i * stride] : static_cast<const int32_t*>(data)[i * stride];
  }
};

// One call: B images, A anchors, C classes, N objects in all.
struct MatchProblem {
  int64_t batch_size, num_anchors, num_classes;
  FloatArray anchors;     // (1, A, 4)
  FloatArray pred_boxes;  // (B, A, 4) boxes, or deltas where `decode`
  FloatArray cls_scores;  // (B, A, C) logits
  FloatArray gt_boxes;    // (1, N, 4)
  IntArray gt_labels;     // (N,)
  IntArray gt_offsets;    // (B + 1,), checked: 0 <= ascending <= N
  const bool* gt_crowd;   // (N,) or null
  int64_t gt_crowd_stride;
  bool decode;
  BoxCoder coder;
  MatchParams params;
  int64_t* cls_match;  // (B, A)
  int64_t* loc_match;  // (B, A)
  int32_t* num_pos;    // (N,)
  int32_t* num_total;  // (N,)
};

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
  bool (*count_positives)(ImageWork&);
  void (*claim_by_regressed)(ImageWork&, int64_t tile_begin, int64_t tile_end);
  void (*label_classification)(ImageWork&);
  void (*claim_by_amplified)(ImageWork&, int64_t tile_begin, int64_t tile_end);
  void (*label_localization)(ImageWork&);
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
