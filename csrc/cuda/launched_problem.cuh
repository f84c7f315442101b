// What the launches of one call share: the problem, scratch memory, and the small functions all of them use.
#pragma once

#include <cstdint>
#include <type_traits>

#include "strided_input.cuh"

// Threads of a block that prepares or claims.
#ifndef MG_OPS_CUDA_THREADS
#define MG_OPS_CUDA_THREADS 256
#endif
// Threads of a block that lists the pairs of an object.
#ifndef MG_OPS_CUDA_OBJECT_THREADS
#define MG_OPS_CUDA_OBJECT_THREADS (MG_OPS_CUDA_THREADS < 512 ? 2 * MG_OPS_CUDA_THREADS : 1024)
#endif
// Threads of a block that ranks.
#ifndef MG_OPS_CUDA_RANK_THREADS
#define MG_OPS_CUDA_RANK_THREADS (MG_OPS_CUDA_THREADS < 256 ? MG_OPS_CUDA_THREADS : 256)
#endif
// The longest list of an object. One that would be longer is not kept: rank_kernel then looks at all anchors.
#ifndef MG_OPS_CUDA_LIST_ROOM
#define MG_OPS_CUDA_LIST_ROOM 2048
#endif
// All lists of a kind together have room for an entry every so many anchors, and for so many more an object.
#ifndef MG_OPS_CUDA_ANCHORS_AN_ENTRY
#define MG_OPS_CUDA_ANCHORS_AN_ENTRY 2
#endif
#ifndef MG_OPS_CUDA_ENTRIES_AN_OBJECT
#define MG_OPS_CUDA_ENTRIES_AN_OBJECT 32
#endif

// Static shared memory of a kernel.
#ifndef MG_OPS_SHARED
#define MG_OPS_SHARED(Type, name) __shared__ Type name
#endif

// Tells an emulator that something rare happens.
#ifndef MG_OPS_NOTE
#define MG_OPS_NOTE(what)
#endif

namespace mg_ops::cuda {

// The type CUDA's 64-bit atomics and shuffles are declared with.
using Word64 = unsigned long long;

constexpr int kThreads = MG_OPS_CUDA_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int kObjectThreads = MG_OPS_CUDA_OBJECT_THREADS;
constexpr int kObjectWarps = kObjectThreads / 32;
constexpr int kRankThreads = MG_OPS_CUDA_RANK_THREADS;
constexpr int kRankWarps = kRankThreads / 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kTile = 64;            // neighboring anchors that a warp handles at a time, two a lane
constexpr uint32_t kGroupTiles = kWarps;  // neighboring tiles with bounds of their own: those that a block prepares
constexpr uint32_t kListRoom = MG_OPS_CUDA_LIST_ROOM;
static_assert(kThreads % 32 == 0 && kWarps <= 32, "a block is whole warps, and one warp can hold a value of each");
static_assert(32 % kGroupTiles == 0, "a warp has a lane for each tile of whole groups");
static_assert(kObjectThreads % 32 == 0 && kObjectWarps <= 32, "a block is whole warps");
static_assert(kRankThreads % 32 == 0 && kRankWarps <= 32, "a block is whole warps");

// The three qualities, and the arrays that hold something for each.
enum Quality : int { kByAnchor = 0, kByRegressed = 1, kByAmplified = 2, kQualities = 3 };

enum class ObjectKind : int32_t { kNone = 0, kObject = 1, kCrowd = 2 };

// An object as the kernels read it: one 32-byte sector.
struct alignas(32) Object {
  Box box;
  float area;
  int32_t label;  // -1: not a class
  ObjectKind kind;
  uint32_t image;
};

// The box around boxes, those that overlap anything at all, and the least and largest of their areas.
struct alignas(32) TileBounds {
  Box box;
  float least_area, most_area;
  uint32_t split;  // of the first part of a tile of anchors: which of them is the first of the second part
  uint32_t unused;
};

// Where the two lists of an object lie, and how long they are.
struct alignas(32) ObjectLists {
  Word64 first_pair;   // in `pairs`
  Word64 first_front;  // in `fronts`
  uint32_t num_near;   // pairs of at least iou_ignored: they come first
  uint32_t num_pairs;  // kNoList: they were too many
  uint32_t front_room;
  uint32_t num_fronts;  // more than there is room for: some are missing
};
constexpr uint32_t kNoList = 0xffffffffu;

// Everything a launch needs: the problem, and scratch.
struct LaunchedProblem : MatchProblem {
  int32_t* image_starts;      // (B + 1,) gt_offsets, clamped: within 0 and N, and never decreasing
  Word64* taken;              // (2,) entries of `pairs` and `fronts` that objects have asked for
  float4* anchor_boxes;       // (A,) the anchors as float32, empty where they are not finite
  TileBounds* anchor_tiles;   // (A / kTile, 2) rounded up: bounds of the parts of each tile
  TileBounds* anchor_groups;  // (A / kTile / kGroupTiles) rounded up: bounds of the tiles of each group
  float4* pred_tiles;         // (B, A / kTile) boxes around the predicted boxes
  Object* objects;            // (N,)
  ObjectLists* lists;         // (N,)
  float* front_quality;       // (N,) an object's front has the anchors it claims from this q_regressed on
  Word64* best[kQualities];   // (N,) claim_key(quality, anchor) of each object's best anchor; 0: every quality is 0
  // For each object its anchors that may matter under q_anchor and q_amplified, whoever owns them:
  // claim_key(q_amplified or q_anchor, anchor), as localization ranks them.
  Word64* pairs;
  Word64* fronts;  // for each object the anchors it claims under q_regressed, from its front_quality on
  int64_t pairs_room, fronts_room;
  // The exponent of q_amplified at p = 1 is this times log2(q_anchor), and rounding keeps order: every exponent lies
  // between that and log2(q_anchor).
  float least_exponent_factor;
  float strong_quality;  // pair_quality of every object that has an anchor of iou_positive
};

// An object's pairs are those from this q_anchor on, given its largest q_anchor. Below it a pair is not counted in
// num_total, and its q_amplified is below both the largest q_anchor and iou_positive: clearly below, so that enough
// pairs are left even where other objects take some.
constexpr float kPairMargin = 0.9f;
MG_OPS_INLINE float pair_quality(const LaunchedProblem& problem, float best) {
  float quality = problem.params.iou_ignored;
  if (problem.params.localization_by_amplified) {
    const float limit = min_float(best, problem.params.iou_positive);
    const float amplified = det_exp(det_log2(limit) / problem.least_exponent_factor * 0.6931471806f) * kPairMargin;
    // NaN where sigma is 1 in float32. Below 1e-30 the slack would not cover the error of so large an exponent.
    quality = amplified >= 1e-30f ? min_float(quality, amplified) : 0.0f;
  }
  return quality;
}

// Points the scratch arrays of a problem that is set else into one allocation, aligned to 32 bytes, and sets what
// follows from the parameters. Returns how many bytes the arrays need; with a null pointer that is all it is for.
// About 12.3 B A + 17 A + 476 N.
inline size_t place_scratch(LaunchedProblem& problem, char* memory) {
  size_t bytes = 0;
  const auto place = [&](auto& array, int64_t count) {
    using Item = std::remove_reference_t<decltype(*array)>;
    array = memory == nullptr ? nullptr : reinterpret_cast<Item*>(memory + bytes);
    bytes += (static_cast<size_t>(count) * sizeof(Item) + 31) / 32 * 32;
  };
  if (problem.num_gt == 0) {  // only the background is written
    return 0;
  }
  problem.least_exponent_factor = amplified_exponent(1.0f, 1.0f, problem.params.sigma);
  problem.strong_quality = pair_quality(problem, 1.0f);
  const int64_t num_tiles = (problem.num_anchors + kTile - 1) / kTile;
  const int64_t entries = problem.batch_size * problem.num_anchors / MG_OPS_CUDA_ANCHORS_AN_ENTRY;
  problem.pairs_room = entries + problem.num_gt * MG_OPS_CUDA_ENTRIES_AN_OBJECT / 2;
  // Of these an object takes room before it is known how many it needs.
  problem.fronts_room =
      problem.params.classification_by_regressed ? 2 * entries + problem.num_gt * MG_OPS_CUDA_ENTRIES_AN_OBJECT : 0;
  place(problem.image_starts, problem.batch_size + 1);
  place(problem.taken, 2);
  place(problem.anchor_boxes, problem.num_anchors);
  place(problem.anchor_tiles, 2 * num_tiles);
  place(problem.anchor_groups, (num_tiles + kGroupTiles - 1) / kGroupTiles);
  place(problem.pred_tiles, problem.params.classification_by_regressed ? problem.batch_size * num_tiles : 0);
  place(problem.objects, problem.num_gt);
  place(problem.lists, problem.num_gt);
  place(problem.front_quality, problem.num_gt);
  for (Word64*& best : problem.best) {
    place(best, problem.num_gt);
  }
  place(problem.pairs, problem.pairs_room);
  place(problem.fronts, problem.fronts_room);
  return bytes;
}

MG_OPS_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) & 31; }
MG_OPS_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) >> 5; }
MG_OPS_DEVICE uint32_t lower_lanes() { return (1u << lane_index()) - 1; }

// Loads and stores of words that other blocks may write meanwhile.
MG_OPS_DEVICE Word64 load_relaxed(const Word64* address) {
#ifdef __CUDA_ARCH__
  Word64 value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(__cvta_generic_to_global(address)) : "memory");
  return value;
#else
  return *address;
#endif
}
MG_OPS_DEVICE void store_relaxed(Word64* address, Word64 value) {
#ifdef __CUDA_ARCH__
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "l"(value) : "memory");
#else
  *address = value;
#endif
}

MG_OPS_DEVICE uint32_t count_tiles(const LaunchedProblem& problem) {
  return (static_cast<uint32_t>(problem.num_anchors) + (kTile - 1)) / kTile;
}

MG_OPS_DEVICE uint32_t count_tile_groups(const LaunchedProblem& problem) {
  return (count_tiles(problem) + (kGroupTiles - 1)) / kGroupTiles;
}

// The objects of an image: number `first` to `first + count` of the packed ones.
struct ImageObjects {
  uint32_t first, count;
};

// Once image_starts is written.
MG_OPS_DEVICE ImageObjects objects_of(const LaunchedProblem& problem, uint32_t image) {
  if (problem.num_gt == 0) {
    return {0, 0};
  }
  const uint32_t first = static_cast<uint32_t>(problem.image_starts[image]);
  return {first, static_cast<uint32_t>(problem.image_starts[image + 1]) - first};
}

MG_OPS_DEVICE Box load_box(const float4* address) {
  const float4 four = *address;
  return {four.x, four.y, four.z, four.w};
}

// Once prepare_kernel has written it.
MG_OPS_DEVICE Box load_anchor(const LaunchedProblem& problem, uint32_t anchor) {
  return load_box(problem.anchor_boxes + anchor);
}

// The predicted box of an anchor; an empty one, like the anchor itself, if it is not finite.
MG_OPS_DEVICE Box load_pred(const MatchProblem& problem, uint32_t image, uint32_t anchor, const Box& anchor_box) {
  Box box = load_row(problem.pred_boxes, image, anchor);
  if (problem.decode) {
    box = decode_box(anchor_box, box.x1, box.y1, box.x2, box.y2, problem.coder);
  }
  return finite_or_empty(box);
}

// p of an object's class at an anchor.
MG_OPS_DEVICE float load_probability(const MatchProblem& problem, uint32_t image, uint32_t anchor, int32_t label) {
  if (label < 0) {
    return 0.0f;
  }
  const FloatInput& scores = problem.cls_scores;
  const int64_t element = image * scores.image_stride + anchor * scores.row_stride + label * scores.column_stride;
  return class_probability(load_float(scores, element), problem.scores_are_probabilities);
}

// --- bounds ----------------------------------------------------------------------------------------------------------

// Floats as integers of the same order, for integer reductions across a warp.
MG_OPS_DEVICE uint32_t ordered_bits(float x) {
  const uint32_t bits = float_bits(x);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
MG_OPS_DEVICE float from_ordered_bits(uint32_t ordered) {
  return bits_float(ordered ^ ((ordered >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

// Bounds of nothing: they overlap no box.
MG_OPS_DEVICE TileBounds no_bounds() {
  return {{kMaxFloat, kMaxFloat, -kMaxFloat, -kMaxFloat}, bits_float(0x7f800000u), 0.0f, kTile, 0};
}

// Widens bounds by a box, if that counts and overlaps anything at all.
MG_OPS_DEVICE void widen(TileBounds& bounds, const Box& box, float area, bool counts = true) {
  if (counts && box.x2 > box.x1 && box.y2 > box.y1) {
    bounds.box = {min_float(bounds.box.x1, box.x1), min_float(bounds.box.y1, box.y1), max_float(bounds.box.x2, box.x2),
                  max_float(bounds.box.y2, box.y2)};
    bounds.least_area = min_float(bounds.least_area, area);
    bounds.most_area = max_float(bounds.most_area, area);
  }
}

// The box around those of all lanes. Every lane must call it.
MG_OPS_DEVICE Box warp_box(const Box& box) {
  return {from_ordered_bits(__reduce_min_sync(kAllLanes, ordered_bits(box.x1))),
          from_ordered_bits(__reduce_min_sync(kAllLanes, ordered_bits(box.y1))),
          from_ordered_bits(__reduce_max_sync(kAllLanes, ordered_bits(box.x2))),
          from_ordered_bits(__reduce_max_sync(kAllLanes, ordered_bits(box.y2)))};
}

// The bounds of all lanes together; areas are not negative, so their bits have their order. Every lane must call it.
MG_OPS_DEVICE TileBounds warp_bounds(const TileBounds& bounds) {
  return {warp_box(bounds.box), bits_float(__reduce_min_sync(kAllLanes, float_bits(bounds.least_area))),
          bits_float(__reduce_max_sync(kAllLanes, float_bits(bounds.most_area))), bounds.split, 0};
}

// Whether a box inside `bounds` can overlap `box`.
MG_OPS_DEVICE bool can_overlap(const Box& bounds, const Box& box) {
  return bounds.x1 < box.x2 && box.x1 < bounds.x2 && bounds.y1 < box.y2 && box.y1 < bounds.y2;
}

// Whether the IoU of a box within the bounds and `box` can be above `quality`. With an intersection I and areas a and g
// it is I / (a + g - I), which grows with I and falls with a, and a is at least I. The slack is for rounding; where
// numbers are too small for it to be relative, the answer is that it can.
MG_OPS_DEVICE bool can_exceed(const TileBounds& bounds, const Box& box, float area, float quality) {
  const float most = min_float(min_float(intersection_area(bounds.box, box), area), bounds.most_area);
  // In this order a sum of huge areas does not overflow where none of the pairs does.
  const float least_union = max_float(bounds.least_area - most, 0.0f) + area;
  const float needed = quality * least_union;
  const bool cannot = needed > 1e-30f && most * (1.0f + 1e-5f) < needed;
  return can_overlap(bounds.box, box) && !cannot;
}

// The bounds of a tile's two parts. Anchors follow each other closely but for ends of rows and of levels: a tile across
// such an end is cut there, or the box around it would reach across the image.
struct SplitBounds {
  TileBounds first, second;
};

MG_OPS_DEVICE bool can_exceed(const SplitBounds& bounds, const Box& box, float area, float quality) {
  return can_exceed(bounds.first, box, area, quality) ||
         (bounds.first.split < kTile && can_exceed(bounds.second, box, area, quality));
}

MG_OPS_DEVICE SplitBounds load_tile(const LaunchedProblem& problem, uint32_t tile) {
  SplitBounds bounds{problem.anchor_tiles[2 * tile], no_bounds()};
  if (bounds.first.split < kTile) {
    bounds.second = problem.anchor_tiles[2 * tile + 1];
  }
  return bounds;
}

// The largest float below a quality > 0.
MG_OPS_DEVICE float just_below(float quality) { return quality > 0.0f ? bits_float(float_bits(quality) - 1) : 0.0f; }

// The IoU of two finite boxes if it is above `quality`; else that or 0, whatever is cheaper. Exactly: a / b in real
// numbers is less than `quality` where a < quality * b rounded, so a / b rounded is not above it.
MG_OPS_DEVICE float iou_above(const Box& a, float area_a, const Box& b, float area_b, float quality) {
  const float intersection = intersection_area(a, b);
  const float union_area = (area_a + area_b) - intersection;
  float iou = 0.0f;
  if (intersection > 0.0f && !(intersection < quality * union_area)) {
    iou = positive_ratio(intersection, union_area);
  }
  return iou;
}

// --- qualities -------------------------------------------------------------------------------------------------------

// Relative slack of bounds on det_log2: far above its error, and far below what a bound decides.
constexpr float kLog2Slack = 1.0f + 1e-5f;

// Under q_regressed every pair from this quality on is compared with all others of its anchor, and objects with good
// predictions list what they own from here on.
MG_OPS_DEVICE float common_front_quality(const LaunchedProblem& problem) { return 0.5f * problem.params.iou_ignored; }

// The order of q_amplified of a pair with this q_anchor > 0.
MG_OPS_DEVICE uint32_t amplified_order(const LaunchedProblem& problem, uint32_t image, uint32_t anchor, int32_t label,
                                       float q) {
  const float p = load_probability(problem, image, anchor, label);
  return exponent_order(amplified_exponent(det_log2(q), p, problem.params.sigma));
}

// The order of quality 1.
MG_OPS_DEVICE uint32_t forced_order(int quality) {
  return quality == kByAmplified ? kForcedExponentOrder : kForcedIouOrder;
}

// The anchor an object claims with quality 1.
MG_OPS_DEVICE uint32_t forced_anchor(const LaunchedProblem& problem, uint32_t object, int quality) {
  Word64 best = problem.best[quality][object];
  // Every q_regressed may be 0; q_anchor is not, or the object would take no part.
  best = best != 0 ? best : problem.best[kByAnchor][object];
  return key_index(best);
}

}  // namespace mg_ops::cuda
