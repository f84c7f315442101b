// Mutual matching of one image on the CPU: three claims (by the anchors' IoU, the regressed boxes' IoU, the amplified
// IoU), each one pass over tiles of 64 boxes, then a selection of the best anchors of each object.
//
// What is never made: a tensor of anchors x objects, or a copy of the class scores. What is kept of an anchor is its
// best object and the quality for it, under q_anchor and under one further quality: 16 bytes. The lists of the
// selection add 16 bytes for each positive or ignored anchor.
//
// Loops marked "vector loop" are those the time goes to; tests/test_vector_loops.py asks the compiler whether it turned
// them into vector instructions, for every instruction set.
//
// Everything here has internal linkage (`static`, anonymous namespaces, comparators of local type): this file is
// compiled for several instruction sets, and a symbol shared between them could bring AVX to a processor without it.
#include "mutual_match_kernel.h"

#include <algorithm>
#include <cstdlib>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#ifndef MG_OPS_CPU_TARGET
#define MG_OPS_CPU_TARGET baseline
#endif

namespace mg_ops {

// The scratch of the image in work. `slot` numbers the valid objects of the image, crowds excluded, in their order.
struct ImageWork {
  const MatchProblem* problem;
  const BoxTile* anchor_tiles;  // of all anchors, where many images share them; else null
  int64_t num_tiles;
  int64_t image;

  // Per anchor, padded to whole tiles. Qualities are stored by their order as unsigned integers, 0 for none.
  void* anchor_memory;
  uint32_t* anchor_quality;  // the largest q_anchor (iou_order)
  int32_t* anchor_owner;     // its slot
  uint32_t* quality;         // the same under q_regressed, then under q_amplified
  int32_t* owner;

  // Per slot.
  void* slot_memory;
  int64_t slot_capacity;
  int32_t num_slots;
  float *x1, *y1, *x2, *y2, *area;
  int32_t* object;             // index of the slot's object within the image
  int64_t* label;              // -1 for an unknown one
  uint64_t* best_by_anchor;    // claim_key of the best anchor; 0: none overlaps, the object takes no part
  uint64_t* best;              // the same under the quality being claimed
  float* cut;                  // of the claim in work: see claim_tile_by_iou
  bool all_anchor_pairs_seen;  // the claim by q_anchor was repeated without cuts
  float* expected_iou;         // n_pos anchors have at least this q_anchor, if they are still owned under q_amplified
  float* may_be_best_iou;      // under q_amplified: no pair below this q_anchor can be the slot's best,
  float* may_be_positive_iou;  // ... and none below this is looked at as its positive, unless too few are found
  uint32_t* enough_order;      // exponent_order that n_pos anchors must reach for that to be exact
  int32_t* look_again;         // they did not: whether the slot is looked at once more
  int32_t *num_pos, *num_total;
  int32_t* list_size;
  int64_t* list_begin;
  uint32_t* list_floor;    // anchors of at most this quality are not, or no longer, of interest; from index -1 on
  uint32_t* likely_order;  // most of the slot's positives should be above this quality
  uint32_t* saved_value;   // anchor_quality and owner under the slot's forced pair
  int32_t* saved_owner;

  // Crowd regions of the image.
  void* crowd_memory;
  int64_t crowd_capacity;
  int32_t num_crowds;
  Box* crowds;

  // The lists of the selection.
  uint64_t* keys;
  int64_t key_capacity;
};

namespace MG_OPS_CPU_TARGET {
namespace {

// Positives are looked for among pairs of at least this share of the IoU they should have; a slot that finds too few of
// them there is looked at again, without bounds.
constexpr float kExpectedShare = 0.8f;
// Qualities below are bounded with a margin, so that no rounding can turn a bound into a lie: 1% of an IoU is 0.0145 in
// log2, and exponents err by less than 1e-4 for every float.
constexpr float kBoundMargin = 0.99f;
constexpr int kMaxBoundPower = 32;

// ---------------------------------------------------------------------------------------------------------------------
// Floating point state and conversions

// Definition arithmetic needs subnormals and round-to-nearest; a caller may have switched them off for this thread.
class DefaultFloatEnvironment {
 public:
#if defined(__SSE2__)
  DefaultFloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatEnvironment() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~DefaultFloatEnvironment() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
  DefaultFloatEnvironment() {}
#endif
};

MG_OPS_INLINE float to_float(float x) { return x; }
MG_OPS_INLINE float to_float(double x) { return static_cast<float>(x); }

struct BFloat16 {
  uint16_t bits;
};
MG_OPS_INLINE float to_float(BFloat16 x) { return bfloat16_to_float(x.bits); }

struct Float16 {
  uint16_t bits;
};
MG_OPS_INLINE float to_float(Float16 x) { return float16_to_float(x.bits); }

// Calls f with a typed pointer to the array's first element.
template <class F>
MG_OPS_INLINE auto with_type(const FloatInput& array, F f) {
  switch (array.type) {
    case FloatType::kFloat16: return f(static_cast<const Float16*>(array.data));
    case FloatType::kBFloat16: return f(static_cast<const BFloat16*>(array.data));
    case FloatType::kFloat64: return f(static_cast<const double*>(array.data));
    default: return f(static_cast<const float*>(array.data));
  }
}

MG_OPS_INLINE float load_float(const FloatInput& array, int64_t offset) {
  return with_type(array, [=](auto* data) { return to_float(data[offset]); });
}

MG_OPS_INLINE Box load_box(const FloatInput& array, int64_t index) {
  const int64_t offset = index * array.row_stride, step = array.column_stride;
  return {load_float(array, offset), load_float(array, offset + step), load_float(array, offset + 2 * step),
          load_float(array, offset + 3 * step)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles

// The four numbers of the `count` boxes (or deltas) from `first` on of image `image`, as a structure of arrays.
static void load_columns(const FloatInput& array, int64_t image, int64_t first, int64_t count, float* c0, float* c1,
                         float* c2, float* c3) {
  with_type(array, [&](auto* data) {
    const auto* row = data + image * array.image_stride + first * array.row_stride;
    const int64_t row_step = array.row_stride, step = array.column_stride;
    if (row_step == 4 && step == 1 && count == kTileSize) {  // the common layout, with strides the compiler knows
      for (int64_t i = 0; i < kTileSize; ++i) {              // vector loop
        c0[i] = to_float(row[4 * i]);
        c1[i] = to_float(row[4 * i + 1]);
        c2[i] = to_float(row[4 * i + 2]);
        c3[i] = to_float(row[4 * i + 3]);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        c0[i] = to_float(row[i * row_step]);
        c1[i] = to_float(row[i * row_step + step]);
        c2[i] = to_float(row[i * row_step + 2 * step]);
        c3[i] = to_float(row[i * row_step + 3 * step]);
      }
    }
  });
}

// Empty boxes in the place of those that are not finite and behind the last of `count`; then areas and bounds.
static void finish_tile(BoxTile& tile, int64_t count) {
  for (int64_t i = count; i < kTileSize; ++i) tile.x1[i] = tile.y1[i] = tile.x2[i] = tile.y2[i] = 0.0f;
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    const Box box = finite_or_empty({tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]});
    tile.x1[i] = box.x1;
    tile.y1[i] = box.y1;
    tile.x2[i] = box.x2;
    tile.y2[i] = box.y2;
    tile.area[i] = box_area(box);
  }
  // Sixteen partial bounds, so that the minimum of a vector is taken lane by lane; bounds may be taken in any order.
  constexpr int kLanes = 16;
  float x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], smallest[kLanes], largest[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    x1[lane] = tile.x1[lane];
    y1[lane] = tile.y1[lane];
    x2[lane] = tile.x2[lane];
    y2[lane] = tile.y2[lane];
    smallest[lane] = largest[lane] = tile.area[lane];
  }
  for (int64_t i = kLanes; i < kTileSize; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      x1[lane] = min_float(x1[lane], tile.x1[i + lane]);
      y1[lane] = min_float(y1[lane], tile.y1[i + lane]);
      x2[lane] = max_float(x2[lane], tile.x2[i + lane]);
      y2[lane] = max_float(y2[lane], tile.y2[i + lane]);
      smallest[lane] = min_float(smallest[lane], tile.area[i + lane]);
      largest[lane] = max_float(largest[lane], tile.area[i + lane]);
    }
  }
  Box bounds = {x1[0], y1[0], x2[0], y2[0]};
  for (int lane = 1; lane < kLanes; ++lane) {
    bounds.x1 = min_float(bounds.x1, x1[lane]);
    bounds.y1 = min_float(bounds.y1, y1[lane]);
    bounds.x2 = max_float(bounds.x2, x2[lane]);
    bounds.y2 = max_float(bounds.y2, y2[lane]);
    smallest[0] = min_float(smallest[0], smallest[lane]);
    largest[0] = max_float(largest[0], largest[lane]);
  }
  tile.bounds = bounds;
  tile.min_area = smallest[0];
  tile.max_area = largest[0];
}

MG_OPS_INLINE int64_t tile_count(const MatchProblem& problem, int64_t tile) {
  return std::min(kTileSize, problem.num_anchors - tile * kTileSize);
}

static void load_anchor_tile(const MatchProblem& problem, int64_t tile_index, BoxTile& tile) {
  const int64_t count = tile_count(problem, tile_index);
  load_columns(problem.anchors, 0, tile_index * kTileSize, count, tile.x1, tile.y1, tile.x2, tile.y2);
  finish_tile(tile, count);
  const Box& bounds = tile.bounds;
  tile.magnitude = max_float(max_float(-bounds.x1, bounds.x2), max_float(-bounds.y1, bounds.y2));
  tile.max_width = tile.max_height = 0.0f;
  for (int64_t i = 0; i < kTileSize; ++i) {
    tile.max_width = max_float(tile.max_width, tile.x2[i] - tile.x1[i]);
    tile.max_height = max_float(tile.max_height, tile.y2[i] - tile.y1[i]);
  }
}

MG_OPS_INLINE const BoxTile& anchor_tile(const ImageWork& work, int64_t tile_index, BoxTile& own_tile) {
  if (work.anchor_tiles != nullptr) return work.anchor_tiles[tile_index];
  load_anchor_tile(*work.problem, tile_index, own_tile);
  return own_tile;
}

static void load_regressed_tile(const ImageWork& work, int64_t tile_index, BoxTile& tile) {
  const MatchProblem& problem = *work.problem;
  const int64_t image = work.image;
  const int64_t first = tile_index * kTileSize, count = tile_count(problem, tile_index);
  if (!problem.decode) {
    load_columns(problem.pred_boxes, image, first, count, tile.x1, tile.y1, tile.x2, tile.y2);
    finish_tile(tile, count);
    return;
  }
  alignas(64) float dx[kTileSize], dy[kTileSize], dw[kTileSize], dh[kTileSize];
  for (int64_t i = count; i < kTileSize; ++i) dx[i] = dy[i] = dw[i] = dh[i] = 0.0f;
  // Where an anchor is not finite its tile has the empty box; whatever is decoded from either overlaps nothing.
  BoxTile own_tile;
  const BoxTile& anchors = anchor_tile(work, tile_index, own_tile);
  load_columns(problem.pred_boxes, image, first, count, dx, dy, dw, dh);
  const BoxCoder coder = problem.coder;
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    const Interval x =
        decode_interval(anchors.x1[i], anchors.x2[i], dx[i], dw[i], coder.weight_x, coder.weight_w, coder.clip);
    tile.x1[i] = x.first;
    tile.x2[i] = x.second;
  }
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    const Interval y =
        decode_interval(anchors.y1[i], anchors.y2[i], dy[i], dh[i], coder.weight_y, coder.weight_h, coder.clip);
    tile.y1[i] = y.first;
    tile.y2[i] = y.second;
  }
  finish_tile(tile, count);
}

MG_OPS_INLINE bool overlap(const Box& a, const Box& b) {
  return (a.x1 < b.x2) & (a.x2 > b.x1) & (a.y1 < b.y2) & (a.y2 > b.y1);
}

// Slots are compared with a tile by the vector; behind the last one come boxes that nothing overlaps.
constexpr int32_t kSlotBlock = 16;

MG_OPS_INLINE void set_box_that_nothing_overlaps(ImageWork& work, int32_t slot) {
  work.x1[slot] = work.y1[slot] = kMaxFloat;
  work.x2[slot] = work.y2[slot] = -kMaxFloat;
  work.area[slot] = 0.0f;
}

// The largest quality in a tile.
MG_OPS_INLINE uint32_t largest_order(const uint32_t* quality) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < kTileSize; ++i) largest = quality[i] > largest ? quality[i] : largest;
  return largest;
}

// Calls visit_block(begin) for every block of slots with one whose box overlaps the bounds, then visit(slot) for those.
template <class VisitBlock, class Visit>
MG_OPS_INLINE void for_overlapping_blocks(const ImageWork& work, const Box& bounds, VisitBlock visit_block,
                                          Visit visit) {
  for (int32_t begin = 0; begin < work.num_slots; begin += kSlotBlock) {
    const float *x1 = work.x1 + begin, *y1 = work.y1 + begin, *x2 = work.x2 + begin, *y2 = work.y2 + begin;
    alignas(16) uint8_t overlaps[kSlotBlock];
    for (int32_t i = 0; i < kSlotBlock; ++i) {  // vector loop
      overlaps[i] = overlap({x1[i], y1[i], x2[i], y2[i]}, bounds);
    }
    uint64_t words[kSlotBlock / 8];
    std::memcpy(words, overlaps, sizeof words);
    if ((words[0] | words[1]) == 0) continue;
    visit_block(begin);
    for (int32_t word = 0; word < kSlotBlock / 8; ++word) {
      for (uint64_t bytes = words[word]; bytes != 0; bytes &= bytes - 1) {
        visit(begin + 8 * word + (__builtin_ctzll(bytes) >> 3));
      }
    }
  }
}

// Calls visit(slot) for every slot whose box overlaps the bounds, in ascending order.
template <class Visit>
MG_OPS_INLINE void for_overlapping_slots(const ImageWork& work, const Box& bounds, Visit visit) {
  for_overlapping_blocks(work, bounds, [](int32_t) {}, visit);
}

// An upper bound of the IoU of any box of the tile with the slot's: no intersection is larger than what the bounds
// share with the object, and for a given intersection the best area is the smallest that can hold it.
MG_OPS_INLINE float largest_possible_iou(const TileBounds& tile, const ImageWork& work, int32_t slot) {
  const float area = work.area[slot];
  const Box object = {work.x1[slot], work.y1[slot], work.x2[slot], work.y2[slot]};
  const float shared = min_float(intersection_area(tile.bounds, object), area);
  const float best_area = min_float(max_float(shared, tile.min_area), tile.max_area);
  const float intersection = min_float(shared, best_area);
  const float largest_union = (best_area + area) - intersection;
  // Areas too large to add up bound nothing.
  return largest_union <= kMaxFloat ? 1.00001f * (intersection / largest_union) : 1.0f;
}

// The slots that a tile may have something to do with.
struct TileSlots {
  static constexpr int32_t kCapacity = 128;
  bool listed;  // else there are more, and nothing is known of them
  int32_t count;
  float least_cut;  // the smallest cut of them
  int32_t slot[kCapacity];
  float possible_iou[kCapacity];
};

static void list_slots(const ImageWork& work, const BoxTile& tile, const float* cut, TileSlots& slots) {
  slots.count = 0;
  slots.least_cut = 2.0f;
  alignas(64) float possible_iou[kSlotBlock];
  const auto bound_block = [&](int32_t begin) {
    for (int32_t i = 0; i < kSlotBlock; ++i) {  // vector loop
      possible_iou[i] = largest_possible_iou(tile, work, begin + i);
    }
  };
  for_overlapping_blocks(work, tile.bounds, bound_block, [&](int32_t slot) {
    if (slots.count < TileSlots::kCapacity) {
      slots.slot[slots.count] = slot;
      slots.possible_iou[slots.count] = possible_iou[slot % kSlotBlock];
    }
    ++slots.count;
    float slot_cut;
    __atomic_load(cut + slot, &slot_cut, __ATOMIC_RELAXED);
    slots.least_cut = min_float(slots.least_cut, slot_cut);
  });
  slots.listed = slots.count <= TileSlots::kCapacity;
}

// Calls visit(slot, position), in ascending order, for the slots that may have a pair of at least needed_iou(slot)
// here.
template <class NeededIou, class Visit>
MG_OPS_INLINE void for_slots_reaching(const ImageWork& work, const BoxTile& tile, const TileSlots& slots,
                                      NeededIou needed_iou, Visit visit) {
  if (slots.listed) {
    for (int32_t i = 0; i < slots.count; ++i) {
      if (slots.possible_iou[i] >= needed_iou(slots.slot[i])) visit(slots.slot[i], i);
    }
  } else {
    int32_t i = 0;
    for_overlapping_slots(work, tile.bounds, [&](int32_t slot) { visit(slot, i++); });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Claims

// Raises a best-anchor key shared by the threads of an image; whether it was raised. The largest key wins in any order.
MG_OPS_INLINE bool raise_key(uint64_t* shared, uint64_t key) {
  uint64_t current = __atomic_load_n(shared, __ATOMIC_RELAXED);
  while (key > current) {
    if (__atomic_compare_exchange_n(shared, &current, key, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return true;
  }
  return false;
}

// One tile under an IoU quality: the best slot of each of its boxes, and the best box of each slot.
//
// A slot has a use for pairs of at least its `cut` only: below it lies neither its best anchor nor one that it needs.
// All pairs of a tile that reach the least cut of its slots are seen, so that whoever owns such a pair's box is known.
// What lies below is seen or not, and must not matter. `next_cut(slot, iou)` is the cut that follows from a best IoU
// found so far.
template <class NextCut>
MG_OPS_INLINE void claim_tile_by_iou(ImageWork& work, const BoxTile& tile, int64_t first, uint32_t* quality,
                                     int32_t* owner, uint64_t* best, NextCut next_cut) {
  alignas(64) int32_t tile_quality[kTileSize] = {};
  alignas(64) int32_t tile_owner[kTileSize];
  for (int64_t i = 0; i < kTileSize; ++i) tile_owner[i] = -1;
  TileSlots slots;
  list_slots(work, tile, work.cut, slots);
  for_slots_reaching(
      work, tile, slots, [&](int32_t) { return slots.least_cut; },
      [&](int32_t slot, int32_t) {
        const Box object = {work.x1[slot], work.y1[slot], work.x2[slot], work.y2[slot]};
        const float area = work.area[slot];
        alignas(64) int32_t order[kTileSize];
        int32_t largest = 0;
        for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
          const float iou = box_iou({tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]}, tile.area[i], object, area);
          order[i] =
              static_cast<int32_t>(iou_order(iou));        // at most that of 1.0: signed comparison is exact, and cheap
          const bool better = order[i] > tile_quality[i];  // slots ascend: a tie stays with the lower one
          tile_quality[i] = better ? order[i] : tile_quality[i];
          tile_owner[i] = better ? slot : tile_owner[i];
          largest = order[i] > largest ? order[i] : largest;
        }
        // An equal quality may still win: it may have been found at a higher index before.
        if (largest > 0 &&
            static_cast<uint32_t>(largest) >= key_order(__atomic_load_n(best + slot, __ATOMIC_RELAXED))) {
          int64_t i = 0;
          while (order[i] != largest) ++i;
          if (raise_key(best + slot, claim_key(static_cast<uint32_t>(largest), static_cast<uint32_t>(first + i)))) {
            // Threads may overtake each other here: a cut that follows from a lesser pair is only more careful.
            const float cut = next_cut(slot, bits_float(static_cast<uint32_t>(largest)));
            __atomic_store(work.cut + slot, &cut, __ATOMIC_RELAXED);
          }
        }
      });
  std::memcpy(quality + first, tile_quality, sizeof tile_quality);
  std::memcpy(owner + first, tile_owner, sizeof tile_owner);
}

// A lower bound, with margin, of the q_anchor that a pair needs to reach the amplified quality a pair of this q_anchor
// has at p = 0: q ** (sigma / (sigma - 1)), the exponent rounded up to the whole `power` (0: no bound).
template <int kCount>
MG_OPS_INLINE void iou_to_compete(const float* iou, int power, float* bound) {
  for (int i = 0; i < kCount; ++i) bound[i] = power == 0 ? 0.0f : kBoundMargin;
  for (int step = 0; step < power; ++step) {
    for (int i = 0; i < kCount; ++i) bound[i] *= iou[i];
  }
  for (int i = 0; i < kCount; ++i) bound[i] = bound[i] < 1e-30f ? 0.0f : bound[i];
}

MG_OPS_INLINE int compete_power(float sigma) {
  const float power = sigma / (sigma - 1.0f);  // above 1; inf where sigma is 1 in float32, which is refused
  if (!(power <= static_cast<float>(kMaxBoundPower))) return 0;
  const int whole = static_cast<int>(power);
  return static_cast<float>(whole) < power ? whole + 1 : whole;
}

// Whether a tile has something to do with a slot that is to be looked at again.
static bool has_slot_to_look_again(const ImageWork& work, const BoxTile& tile) {
  bool again = false;
  for_overlapping_slots(work, tile.bounds, [&](int32_t slot) { again |= work.look_again[slot] != 0; });
  return again;
}

// Pairs whose amplified quality is asked for, gathered over tiles: their scores arrive together, and the arithmetic
// runs on whole vectors.
struct PairBatch {
  static constexpr int kCapacity = 512;
  int size = 0;
  int32_t slot[kCapacity];
  uint32_t anchor[kCapacity];
  int64_t score[kCapacity];  // where its logit lies; negative for an unknown label
  alignas(64) float iou[kCapacity];
  alignas(64) float logit[kCapacity];
  alignas(64) uint32_t order[kCapacity];
};

static void evaluate_pairs(PairBatch& pairs, const FloatInput& cls_scores, float sigma) {
  with_type(cls_scores, [&](auto* data) {
    // An unknown label has p = 0, which is what a NaN logit stands for.
    const float unknown = bits_float(0x7fc00000u);
    for (int i = 0; i < pairs.size; ++i) pairs.logit[i] = pairs.score[i] < 0 ? unknown : to_float(data[pairs.score[i]]);
  });
  const int padded = (pairs.size + 15) & ~15;
  for (int i = pairs.size; i < padded; ++i) {
    pairs.iou[i] = 1.0f;
    pairs.logit[i] = 0.0f;
  }
  for (int i = 0; i < padded; ++i) {  // vector loop
    const float p = class_probability(pairs.logit[i]);
    pairs.order[i] = exponent_order(amplified_exponent(det_log2(pairs.iou[i]), p, sigma));
  }
}

// Evaluates the pairs gathered, lets them compete for their anchors and to be their slots' best, and empties the batch.
static void compete(ImageWork& work, PairBatch& pairs) {
  evaluate_pairs(pairs, work.problem->cls_scores, work.problem->params.sigma);
  for (int i = 0; i < pairs.size; ++i) {
    const int32_t slot = pairs.slot[i];
    const uint32_t anchor = pairs.anchor[i], order = pairs.order[i];
    if (order > work.quality[anchor]) {  // an anchor's slots ascend: a tie stays with the lower one
      work.quality[anchor] = order;
      work.owner[anchor] = slot;
    }
    raise_key(work.best + slot, claim_key(order, anchor));
  }
  pairs.size = 0;
}

// One tile under q_amplified. Scores are read only for pairs that can matter:
//  - an anchor matters if it has a pair of at least the slot's may_be_positive_iou; then every pair that could own it
//  does;
//  - besides, every pair that could be its slot's best.
// Anchors that do not matter are left without an owner. `lower_bounds` verifies that they did not.
// With only_again, tiles without a slot to look at again stay as they are.
static void claim_tile_by_amplified(ImageWork& work, const BoxTile& tile, int64_t tile_index, int power,
                                    float least_positive_iou, bool only_again, PairBatch& pairs) {
  constexpr int32_t kKept = 32;  // slots whose IoUs stay at hand between the two looks at them
  const MatchProblem& problem = *work.problem;
  const int64_t first = tile_index * kTileSize;
  const uint32_t* anchor_quality = work.anchor_quality + first;

  if (only_again && !has_slot_to_look_again(work, tile)) return;
  for (int64_t i = 0; i < kTileSize; ++i) work.quality[first + i] = 0;
  for (int64_t i = 0; i < kTileSize; ++i) work.owner[first + i] = -1;
  const float largest_anchor_iou = bits_float(largest_order(anchor_quality));
  if (largest_anchor_iou == 0.0f || largest_anchor_iou < least_positive_iou) return;
  TileSlots slots;
  list_slots(work, tile, work.may_be_positive_iou, slots);
  if (largest_anchor_iou < slots.least_cut) return;

  const auto tile_iou = [&](int32_t slot, float* iou) {
    const Box object = {work.x1[slot], work.y1[slot], work.x2[slot], work.y2[slot]};
    const float area = work.area[slot];
    for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
      iou[i] = box_iou({tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]}, tile.area[i], object, area);
    }
  };

  // First look: which anchors matter, and from which IoU on they can be owned.
  alignas(64) float kept_iou[kKept][kTileSize];
  bool kept[kKept] = {};
  alignas(64) int32_t matters[kTileSize] = {};
  const auto may_be_positive = [&](int32_t slot) { return work.may_be_positive_iou[slot]; };
  for_slots_reaching(work, tile, slots, may_be_positive, [&](int32_t slot, int32_t position) {
    alignas(64) float local_iou[kTileSize];
    float* iou = position < kKept ? kept_iou[position] : local_iou;
    if (position < kKept) kept[position] = true;
    tile_iou(slot, iou);
    const float threshold = work.may_be_positive_iou[slot];
    for (int64_t i = 0; i < kTileSize; ++i) matters[i] |= (iou[i] > 0.0f) & (iou[i] >= threshold);
  });
  int32_t any = 0;
  for (int64_t i = 0; i < kTileSize; ++i) any |= matters[i];
  if (any == 0) return;
  alignas(64) float largest_iou[kTileSize];
  alignas(64) float needed_iou[kTileSize];
  std::memcpy(largest_iou, anchor_quality, sizeof largest_iou);
  iou_to_compete<kTileSize>(largest_iou, power, needed_iou);
  uint32_t least_needed = 0x40000000u;  // 2.0
  for (int64_t i = 0; i < kTileSize; ++i) {
    needed_iou[i] = matters[i] != 0 ? needed_iou[i] : 2.0f;
    const uint32_t bits = float_bits(needed_iou[i]);
    least_needed = bits < least_needed ? bits : least_needed;
  }

  // Second look: gather the pairs.
  const int64_t score_bytes = with_type(problem.cls_scores, [](auto* data) { return int64_t{sizeof *data}; });
  const auto may_own_or_be_best = [&](int32_t slot) {
    return min_float(bits_float(least_needed), work.may_be_best_iou[slot]);
  };
  for_slots_reaching(work, tile, slots, may_own_or_be_best, [&](int32_t slot, int32_t position) {
    alignas(64) float local_iou[kTileSize];
    const float* iou = local_iou;
    if (position < kKept && kept[position]) {
      iou = kept_iou[position];
    } else {
      tile_iou(slot, local_iou);
    }
    alignas(64) uint8_t wanted[kTileSize];
    const float may_be_best = work.may_be_best_iou[slot];
    for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
      wanted[i] = (iou[i] > 0.0f) & ((iou[i] >= needed_iou[i]) | (iou[i] >= may_be_best));
    }
    if (pairs.size > PairBatch::kCapacity - kTileSize) compete(work, pairs);
    const int64_t label = work.label[slot];
    const int64_t first_score = work.image * problem.cls_scores.image_stride + first * problem.cls_scores.row_stride +
                                label * problem.cls_scores.column_stride;
    for (int64_t word = 0; word < kTileSize; word += 8) {
      uint64_t bytes;
      std::memcpy(&bytes, wanted + word, sizeof bytes);
      for (; bytes != 0; bytes &= bytes - 1) {
        const int64_t lane = word + (__builtin_ctzll(bytes) >> 3);
        const int i = pairs.size++;
        pairs.slot[i] = slot;
        pairs.anchor[i] = static_cast<uint32_t>(first + lane);
        pairs.iou[i] = iou[lane];
        pairs.score[i] = label < 0 ? -1 : first_score + lane * problem.cls_scores.row_stride;
        // Scores lie apart, each in a cache line of its own: asked for here, they arrive together.
        if (label >= 0) {
          __builtin_prefetch(static_cast<const char*>(problem.cls_scores.data) + pairs.score[i] * score_bytes);
        }
      }
    }
  });
}

// Gives each active slot's best anchor quality 1 for it: it then owns the anchor, unless a lower slot's quality is 1
// too.
static void force_best(const ImageWork& work, const uint64_t* best, uint32_t forced_order, uint32_t* quality,
                       int32_t* owner) {
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    if (work.best_by_anchor[slot] == 0) continue;
    const uint64_t key = best[slot] != 0 ? best[slot] : work.best_by_anchor[slot];
    const uint32_t anchor = key_index(key);
    if (quality[anchor] < forced_order || owner[anchor] > slot) {
      quality[anchor] = forced_order;
      owner[anchor] = slot;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Selection

struct LargerKey {
  bool operator()(uint64_t a, uint64_t b) const { return a > b; }
};

MG_OPS_INLINE uint32_t smallest_order(const uint64_t* keys, int64_t size) {
  uint64_t smallest = ~uint64_t{0};
  for (int64_t i = 0; i < size; ++i) smallest = keys[i] < smallest ? keys[i] : smallest;
  return key_order(smallest);
}

// The first `count` of `size` keys become the `count` largest, in any order.
static void select_largest(uint64_t* keys, int64_t count, int64_t size) {
  if (count > 0 && count < size) std::nth_element(keys, keys + count, keys + size, LargerKey{});
}

// Adds to the lists the owned anchors whose quality is above their slot's list_floor, and keeps the num_kept best.
static void collect_owned(ImageWork& work, const uint32_t* quality, const int32_t* owner, const int32_t* num_kept) {
  uint32_t least_floor = ~uint32_t{0};
  for (int32_t slot = 0; slot < work.num_slots; ++slot) least_floor = std::min(least_floor, work.list_floor[slot]);
  for (int64_t tile = 0; tile < work.num_tiles; ++tile) {
    const int64_t first = tile * kTileSize;
    // Most anchors are below: sort out whole tiles, then vectors. list_floor[-1], of those without an owner, lets none
    // pass.
    if (largest_order(quality + first) <= least_floor) continue;
    alignas(64) uint8_t above[kTileSize];
    for (int64_t i = 0; i < kTileSize; ++i) above[i] = quality[first + i] > work.list_floor[owner[first + i]];
    for (int64_t word = 0; word < kTileSize; word += 8) {
      uint64_t bytes;
      std::memcpy(&bytes, above + word, sizeof bytes);
      for (; bytes != 0; bytes &= bytes - 1) {
        const int64_t anchor = first + word + (__builtin_ctzll(bytes) >> 3);
        const int32_t slot = owner[anchor];
        if (quality[anchor] <= work.list_floor[slot]) continue;  // the floor may have risen meanwhile
        uint64_t* list = work.keys + work.list_begin[slot];
        int32_t size = work.list_size[slot];
        list[size++] = claim_key(quality[anchor], static_cast<uint32_t>(anchor));
        if (size == work.list_begin[slot + 1] - work.list_begin[slot]) {
          // Anchors ascend: from now on one of equal quality would come after all that are kept.
          const int32_t kept = num_kept[slot];
          select_largest(list, kept, size);
          size = kept;
          work.list_floor[slot] = smallest_order(list, kept);
        }
        work.list_size[slot] = size;
      }
    }
  }
}

// The list_size <= num_kept best of the anchors each slot owns under a quality. Looks first at those above
// `likely_order`, which should be enough of them, and once more at all where they are not.
static void select_owned(ImageWork& work, const uint32_t* quality, const int32_t* owner, const int32_t* num_kept,
                         const uint32_t* likely_order) {
  const int32_t num_slots = work.num_slots;
  for (int32_t slot = 0; slot < num_slots; ++slot) {
    work.list_size[slot] = 0;
    work.list_floor[slot] = likely_order[slot];
  }
  collect_owned(work, quality, owner, num_kept);
  bool too_few = false;
  for (int32_t slot = 0; slot < num_slots; ++slot) {
    const bool again = work.list_size[slot] < num_kept[slot] && likely_order[slot] > 0;
    work.list_floor[slot] = again ? 0 : ~uint32_t{0};
    if (again) work.list_size[slot] = 0;
    too_few |= again;
  }
  if (too_few) collect_owned(work, quality, owner, num_kept);
  for (int32_t slot = 0; slot < num_slots; ++slot) {
    select_largest(work.keys + work.list_begin[slot], num_kept[slot], work.list_size[slot]);
    work.list_size[slot] = std::min(work.list_size[slot], num_kept[slot]);
  }
}

static void fill_row(int64_t* row, int64_t count) { std::memset(row, 0xff, static_cast<size_t>(count) * sizeof *row); }

// Writes the collected lists: the num_pos best of each become positives, the others are ignored.
static void write_classification(ImageWork& work) {
  int64_t* row = work.problem->cls_match + work.image * work.problem->num_anchors;
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    uint64_t* list = work.keys + work.list_begin[slot];
    const int32_t size = work.list_size[slot], num_pos = std::min(work.num_pos[slot], size);
    select_largest(list, num_pos, size);
    for (int32_t i = 0; i < size; ++i) row[key_index(list[i])] = i < num_pos ? work.object[slot] : kIgnored;
  }
}

static void write_localization(ImageWork& work) {
  int64_t* row = work.problem->loc_match + work.image * work.problem->num_anchors;
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    uint64_t* list = work.keys + work.list_begin[slot];
    const int32_t size = work.list_size[slot], num_pos = std::min(work.num_pos[slot], size);
    select_largest(list, num_pos, size);
    for (int32_t i = 0; i < num_pos; ++i) row[key_index(list[i])] = work.object[slot];
  }
}

// Background that a crowd region covers becomes ignored.
static void ignore_crowds(const ImageWork& work) {
  const MatchProblem& problem = *work.problem;
  int64_t* row = problem.cls_match + work.image * problem.num_anchors;
  BoxTile own_tile;
  for (int64_t tile_index = 0; tile_index < work.num_tiles; ++tile_index) {
    const BoxTile& tile = anchor_tile(work, tile_index, own_tile);
    alignas(64) int32_t covered[kTileSize] = {};
    bool any = false;
    for (int32_t k = 0; k < work.num_crowds; ++k) {
      const Box crowd = work.crowds[k];
      if (!overlap(tile.bounds, crowd)) continue;
      any = true;
      for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
        const Box box = {tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]};
        const float coverage = positive_ratio(intersection_area(box, crowd), tile.area[i]);
        covered[i] |= coverage >= problem.params.crowd_overlap;
      }
    }
    if (!any) continue;
    const int64_t first = tile_index * kTileSize, count = tile_count(problem, tile_index);
    for (int64_t i = 0; i < count; ++i) {
      if (covered[i] != 0 && row[first + i] == kBackground) row[first + i] = kIgnored;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory: plain malloc, grown on demand and kept between the images of one call

static bool grow(void** memory, int64_t* capacity, int64_t needed, size_t bytes_each) {
  if (needed <= *capacity) return true;
  std::free(*memory);
  const int64_t rounded = (needed + 63) & ~int64_t{63};
  *memory = std::aligned_alloc(64, (static_cast<size_t>(rounded) * bytes_each + 63) & ~size_t{63});
  *capacity = *memory != nullptr ? rounded : 0;
  return *memory != nullptr;
}

// Hands out consecutive arrays of a block.
struct Carver {
  char* next;
  int64_t count;
  template <class T>
  void carve(T*& array) {
    array = reinterpret_cast<T*>(next);
    next += static_cast<size_t>(count) * sizeof(T);
  }
};

constexpr size_t kSlotBytes = 4 * 8 + 19 * 4;  // four arrays of 8 bytes, nineteen of 4
constexpr int64_t kListSlack = 8;

static bool reserve_slots(ImageWork& work, int64_t count) {
  // One more for the end of the last list, and for the floor before the first.
  if (!grow(&work.slot_memory, &work.slot_capacity, count + 1, kSlotBytes)) return false;
  Carver carver = {static_cast<char*>(work.slot_memory), work.slot_capacity};
  carver.carve(work.label);
  carver.carve(work.best_by_anchor);
  carver.carve(work.best);
  carver.carve(work.list_begin);
  carver.carve(work.x1);
  carver.carve(work.y1);
  carver.carve(work.x2);
  carver.carve(work.y2);
  carver.carve(work.area);
  carver.carve(work.object);
  carver.carve(work.cut);
  carver.carve(work.expected_iou);
  carver.carve(work.may_be_best_iou);
  carver.carve(work.may_be_positive_iou);
  carver.carve(work.enough_order);
  carver.carve(work.look_again);
  carver.carve(work.num_pos);
  carver.carve(work.num_total);
  carver.carve(work.list_size);
  carver.carve(work.list_floor);
  *work.list_floor++ = ~uint32_t{0};
  carver.carve(work.likely_order);
  carver.carve(work.saved_value);
  carver.carve(work.saved_owner);
  return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// The steps of an image

static void load_anchor_tiles(const MatchProblem& problem, int64_t tile_begin, int64_t tile_end, BoxTile* tiles) {
  const DefaultFloatEnvironment environment;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) load_anchor_tile(problem, tile, tiles[tile]);
}

static void destroy_work(ImageWork* work) {
  if (work == nullptr) return;
  std::free(work->anchor_memory);
  std::free(work->slot_memory);
  std::free(work->crowd_memory);
  std::free(work->keys);
  std::free(work);
}

static ImageWork* create_work(const MatchProblem& problem, const BoxTile* anchor_tiles) {
  ImageWork* work = static_cast<ImageWork*>(std::calloc(1, sizeof(ImageWork)));
  if (work == nullptr) return nullptr;
  work->problem = &problem;
  work->anchor_tiles = anchor_tiles;
  work->num_tiles = (problem.num_anchors + kTileSize - 1) / kTileSize;
  int64_t capacity = 0;
  if (!grow(&work->anchor_memory, &capacity, work->num_tiles * kTileSize, 16)) {
    destroy_work(work);
    return nullptr;
  }
  Carver carver = {static_cast<char*>(work->anchor_memory), capacity};
  carver.carve(work->anchor_quality);
  carver.carve(work->anchor_owner);
  carver.carve(work->quality);
  carver.carve(work->owner);
  return work;
}

// Reads the objects of an image: the valid ones become slots, crowd regions are kept apart.
static bool begin_image(ImageWork& work, int64_t image) {
  const DefaultFloatEnvironment environment;
  const MatchProblem& problem = *work.problem;
  work.image = image;
  work.num_slots = work.num_crowds = 0;
  work.all_anchor_pairs_seen = false;
  const int64_t begin = load_integer(problem.gt_offsets, image), end = load_integer(problem.gt_offsets, image + 1);
  fill_row(problem.cls_match + image * problem.num_anchors, problem.num_anchors);
  fill_row(problem.loc_match + image * problem.num_anchors, problem.num_anchors);
  if (!reserve_slots(work, end - begin)) return false;
  for (int64_t i = begin; i < end; ++i) {
    const Box box = load_box(problem.gt_boxes, i);
    if (!is_object(box)) continue;
    if (problem.gt_crowd != nullptr && problem.gt_crowd[i * problem.crowd_stride] != 0) {
      if (work.num_crowds == 0 && !grow(&work.crowd_memory, &work.crowd_capacity, end - begin, sizeof(Box))) {
        return false;
      }
      work.crowds = static_cast<Box*>(work.crowd_memory);
      work.crowds[work.num_crowds++] = box;
      continue;
    }
    const int32_t slot = work.num_slots++;
    work.x1[slot] = box.x1;
    work.y1[slot] = box.y1;
    work.x2[slot] = box.x2;
    work.y2[slot] = box.y2;
    work.area[slot] = box_area(box);
    work.object[slot] = static_cast<int32_t>(i - begin);
    const int64_t label = load_integer(problem.gt_labels, i);
    work.label[slot] = label >= 0 && label < problem.num_classes ? label : -1;
    work.best_by_anchor[slot] = 0;
    work.cut[slot] = 0.0f;
  }
  for (int32_t slot = work.num_slots; slot % kSlotBlock != 0; ++slot) set_box_that_nothing_overlaps(work, slot);
  return true;
}

// What the claim by q_anchor must see of an object whose best q_anchor is at least `best_iou`: all that counts, and all
// that the claim by q_amplified will look at.
static float cut_by_anchors(const MatchParams& params, int power, float best_iou) {
  float cut = min_float(best_iou, params.iou_ignored);
  if (params.localization_by_amplified) {
    const float expected_iou = kExpectedShare * min_float(best_iou, params.iou_positive);
    float to_compete;
    iou_to_compete<1>(&expected_iou, power, &to_compete);
    cut = min_float(cut, to_compete);
  }
  return cut;
}

// What the claim by q_regressed must see: IoUs well below those of the anchors, since regressed boxes should do no
// worse.
static float cut_by_regressed(const ImageWork& work, int32_t slot, float best_iou) {
  const float best_anchor_iou = bits_float(key_order(work.best_by_anchor[slot]));
  return min_float(best_iou, kExpectedShare * min_float(best_anchor_iou, work.problem->params.iou_ignored));
}

// Tiles run from the last to the first: detectors list their small anchors, which are most, first. Large objects have
// found good anchors by then, and need not look at the small ones.
static void claim_by_anchors(ImageWork& work, int64_t tile_begin, int64_t tile_end) {
  if (work.num_slots == 0) return;
  const DefaultFloatEnvironment environment;
  const MatchParams& params = work.problem->params;
  const int power = compete_power(params.sigma);
  BoxTile own_tile;
  for (int64_t tile = tile_end - 1; tile >= tile_begin; --tile) {
    claim_tile_by_iou(work, anchor_tile(work, tile, own_tile), tile * kTileSize, work.anchor_quality, work.anchor_owner,
                      work.best_by_anchor,
                      [&](int32_t, float best_iou) { return cut_by_anchors(params, power, best_iou); });
  }
}

// The same without cuts.
static void see_all_anchor_pairs(ImageWork& work) {
  for (int32_t slot = 0; slot < work.num_slots; ++slot) work.cut[slot] = 0.0f;
  BoxTile own_tile;
  for (int64_t tile = 0; tile < work.num_tiles; ++tile) {
    claim_tile_by_iou(work, anchor_tile(work, tile, own_tile), tile * kTileSize, work.anchor_quality, work.anchor_owner,
                      work.best_by_anchor, [](int32_t, float) { return 0.0f; });
  }
  work.all_anchor_pairs_seen = true;
}

// Forces the best anchors of q_anchor, and keeps what was there for `unforce_anchors`.
static void force_anchors(ImageWork& work) {
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    if (work.best_by_anchor[slot] == 0) continue;
    const uint32_t anchor = key_index(work.best_by_anchor[slot]);
    work.saved_value[slot] = work.anchor_quality[anchor];
    work.saved_owner[slot] = work.anchor_owner[anchor];
  }
  force_best(work, work.best_by_anchor, kForcedIouOrder, work.anchor_quality, work.anchor_owner);
}

// What q_anchor really is at the forced pairs: the claim by q_amplified bounds from it.
static void unforce_anchors(ImageWork& work) {
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    if (work.best_by_anchor[slot] == 0) continue;
    const uint32_t anchor = key_index(work.best_by_anchor[slot]);
    work.anchor_quality[anchor] = work.saved_value[slot];
    work.anchor_owner[anchor] = work.saved_owner[slot];
  }
}

// Counts Np and Np + Ni of each object, writes the labels that follow from q_anchor alone, and prepares the next
// claims.
static bool count_positives(ImageWork& work) {
  const DefaultFloatEnvironment environment;
  const MatchProblem& problem = *work.problem;
  const MatchParams& params = problem.params;
  const int32_t num_slots = work.num_slots;
  if (num_slots == 0) return true;

  for (int32_t slot = 0; slot < num_slots; ++slot) {
    work.num_pos[slot] = work.num_total[slot] = 0;
    work.expected_iou[slot] = bits_float(key_order(work.best_by_anchor[slot]));
    // Overlapped by no anchor, it takes no part from here on.
    if (work.best_by_anchor[slot] == 0) set_box_that_nothing_overlaps(work, slot);
  }
  force_anchors(work);

  const uint32_t positive = iou_order(params.iou_positive), ignored = iou_order(params.iou_ignored);
  for (int64_t tile = 0; tile < work.num_tiles; ++tile) {
    const uint32_t* quality = work.anchor_quality + tile * kTileSize;
    const int32_t* owner = work.anchor_owner + tile * kTileSize;
    if (largest_order(quality) < ignored) continue;
    for (int64_t i = 0; i < kTileSize; ++i) {
      if (quality[i] < ignored || owner[i] < 0) continue;
      work.num_total[owner[i]] += 1;
      if (quality[i] < positive) continue;
      work.num_pos[owner[i]] += 1;
      work.expected_iou[owner[i]] = min_float(work.expected_iou[owner[i]], bits_float(quality[i]));
    }
  }

  const int64_t begin = load_integer(problem.gt_offsets, work.image);
  int64_t num_keys = 0;
  bool some_own_too_few = false;
  for (int32_t slot = 0; slot < num_slots; ++slot) {
    work.list_begin[slot] = num_keys;
    work.likely_order[slot] = 0;
    if (work.best_by_anchor[slot] == 0) continue;
    some_own_too_few |= work.num_total[slot] == 0;
    work.num_pos[slot] = std::max(work.num_pos[slot], 1);
    work.num_total[slot] = std::max(work.num_total[slot], work.num_pos[slot]);
    problem.num_pos[begin + work.object[slot]] = work.num_pos[slot];
    problem.num_total[begin + work.object[slot]] = work.num_total[slot];
    // The counts say how many anchors have this q_anchor; regressed boxes should do no worse.
    work.likely_order[slot] = std::min(key_order(work.best_by_anchor[slot]), ignored) - 1;
    num_keys += 2 * static_cast<int64_t>(work.num_total[slot]) + kListSlack;
  }
  work.list_begin[num_slots] = num_keys;
  void* keys = work.keys;
  const bool enough_memory = grow(&keys, &work.key_capacity, num_keys, sizeof(uint64_t));
  work.keys = static_cast<uint64_t*>(keys);
  if (!enough_memory) return false;

  if (!params.classification_by_regressed || !params.localization_by_amplified) {
    // An object that lost all anchors that count takes the best of those it has left, however low their quality.
    if (some_own_too_few) {
      see_all_anchor_pairs(work);
      force_anchors(work);
    }
    if (!params.classification_by_regressed) {
      select_owned(work, work.anchor_quality, work.anchor_owner, work.num_total, work.likely_order);
      write_classification(work);
    }
    if (!params.localization_by_amplified) {
      select_owned(work, work.anchor_quality, work.anchor_owner, work.num_pos, work.likely_order);
      write_localization(work);
    }
  }
  unforce_anchors(work);
  for (int32_t slot = 0; slot < num_slots; ++slot) {
    work.best[slot] = 0;
    work.cut[slot] = 0.0f;
  }
  return true;
}

// Predictions are asked for so many tiles ahead of their use.
constexpr int64_t kTilesAhead = 4;

// Asks for the predictions of a tile ahead of time: tiles run backwards, which the processor does not foresee.
static void prefetch_predictions(const ImageWork& work, int64_t tile) {
  const FloatInput& pred_boxes = work.problem->pred_boxes;
  const int64_t first = work.image * pred_boxes.image_stride + tile * kTileSize * pred_boxes.row_stride;
  with_type(pred_boxes, [&](auto* data) {
    if (pred_boxes.row_stride != 4 || pred_boxes.column_stride != 1) return;
    const char* begin = reinterpret_cast<const char*>(data + first);
    for (size_t byte = 0; byte < 4 * kTileSize * sizeof *data; byte += 64) __builtin_prefetch(begin + byte);
  });
}

// Bounds of the regressed boxes of a tile without decoding them: from the bounds of their anchors and the largest
// deltas. Looser than those of the decoded boxes, but a fraction of the work, and enough to leave out the many tiles
// that no object needs. False: no bounds, the boxes must be decoded.
static bool bound_regressed_tile(const ImageWork& work, int64_t tile_index, TileBounds& bounds) {
  const MatchProblem& problem = *work.problem;
  const FloatInput& deltas = problem.pred_boxes;
  if (!problem.decode || work.anchor_tiles == nullptr || deltas.type != FloatType::kFloat32) return false;
  if (deltas.row_stride != 4 || deltas.column_stride != 1 || tile_count(problem, tile_index) != kTileSize) return false;
  const float* rows = static_cast<const float*>(deltas.data) + work.image * deltas.image_stride +
                      tile_index * kTileSize * deltas.row_stride;
  // Four rows side by side. Magnitudes are compared as integers: a NaN is then the largest, and bounds nothing.
  constexpr int kLanes = 16;
  uint32_t largest[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) largest[lane] = 0;
  for (int64_t i = 0; i < 4 * kTileSize; i += kLanes) {  // vector loop
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t magnitude = float_bits(rows[i + lane]) & 0x7fffffffu;
      largest[lane] = magnitude > largest[lane] ? magnitude : largest[lane];
    }
  }
  for (int lane = 0; lane < kLanes / 2; ++lane) largest[lane] = std::max(largest[lane], largest[lane + kLanes / 2]);
  for (int lane = 0; lane < kLanes / 4; ++lane) largest[lane] = std::max(largest[lane], largest[lane + kLanes / 4]);
  const BoxCoder& coder = problem.coder;
  const float shift_x = 1.001f * (bits_float(largest[0]) / coder.weight_x);
  const float shift_y = 1.001f * (bits_float(largest[1]) / coder.weight_y);
  const float grow_w = bits_float(largest[2]) / coder.weight_w, grow_h = bits_float(largest[3]) / coder.weight_h;
  if (!(grow_w <= 1.0f && grow_h <= 1.0f)) return false;
  // exp(x) <= 1 + x + x^2 and exp(-x) >= 1 - x for 0 <= x <= 1: plus a margin far above any rounding.
  const float larger_w = 1.001f + grow_w * (1.0f + grow_w), larger_h = 1.001f + grow_h * (1.0f + grow_h);
  const float smaller = max_float(0.999f - grow_w, 0.0f) * max_float(0.999f - grow_h, 0.0f);
  const BoxTile& anchors = work.anchor_tiles[tile_index];
  const Box& box = anchors.bounds;
  const float margin_x = anchors.max_width * (shift_x + 0.5f * (larger_w - 1.0f)) + 1e-4f * anchors.magnitude;
  const float margin_y = anchors.max_height * (shift_y + 0.5f * (larger_h - 1.0f)) + 1e-4f * anchors.magnitude;
  bounds.bounds = {box.x1 - margin_x, box.y1 - margin_y, box.x2 + margin_x, box.y2 + margin_y};
  bounds.min_area = anchors.min_area * smaller;
  bounds.max_area = anchors.max_area * (larger_w * larger_h);
  // Where something is too large for float, or a shift is NaN, nothing is known.
  const float extent = (bounds.bounds.x2 - bounds.bounds.x1) + (bounds.bounds.y2 - bounds.bounds.y1);
  return extent <= kMaxFloat && bounds.max_area <= kMaxFloat;
}

// The least cut of all slots. Cuts only rise, so an old one is careful.
static float least_cut(const ImageWork& work) {
  float least = 2.0f;
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    float cut;
    __atomic_load(work.cut + slot, &cut, __ATOMIC_RELAXED);
    least = min_float(least, cut);
  }
  return least;
}

// Whether a box within these bounds may have an IoU of at least `cut` with some slot: `largest_possible_iou` for every
// slot, without its division.
static bool some_slot_reaches(const ImageWork& work, const TileBounds& tile, float cut) {
  for (int32_t begin = 0; begin < work.num_slots; begin += kSlotBlock) {
    const float *x1 = work.x1 + begin, *y1 = work.y1 + begin, *x2 = work.x2 + begin, *y2 = work.y2 + begin;
    const float* area = work.area + begin;
    alignas(16) uint8_t reaches[kSlotBlock];
    for (int32_t i = 0; i < kSlotBlock; ++i) {  // vector loop
      const float shared = min_float(intersection_area(tile.bounds, {x1[i], y1[i], x2[i], y2[i]}), area[i]);
      const float best_area = min_float(max_float(shared, tile.min_area), tile.max_area);
      const float intersection = min_float(shared, best_area);
      const float largest_union = (best_area + area[i]) - intersection;
      reaches[i] = (1.0001f * intersection >= cut * largest_union) | !(largest_union <= kMaxFloat);
    }
    uint64_t words[kSlotBlock / 8];
    std::memcpy(words, reaches, sizeof words);
    if ((words[0] | words[1]) != 0) return true;
  }
  return false;
}

static void claim_by_regressed(ImageWork& work, int64_t tile_begin, int64_t tile_end) {
  if (work.num_slots == 0 || !work.problem->params.classification_by_regressed) return;
  const DefaultFloatEnvironment environment;
  BoxTile tile;
  const bool few_slots = work.num_slots <= TileSlots::kCapacity;  // of many, one reaches almost every tile
  float cut = 0.0f;
  for (int64_t i = tile_end - 1; i >= tile_begin; --i) {
    if (i - kTilesAhead >= tile_begin) prefetch_predictions(work, i - kTilesAhead);
    if (i % kTilesAhead == 0) cut = least_cut(work);
    TileBounds bounds;
    if (few_slots && bound_regressed_tile(work, i, bounds) && !some_slot_reaches(work, bounds, cut)) {
      const int64_t first = i * kTileSize;
      std::fill_n(work.quality + first, kTileSize, 0u);
      std::fill_n(work.owner + first, kTileSize, -1);
      continue;
    }
    load_regressed_tile(work, i, tile);
    claim_tile_by_iou(work, tile, i * kTileSize, work.quality, work.owner, work.best,
                      [&](int32_t slot, float best_iou) { return cut_by_regressed(work, slot, best_iou); });
  }
}

// Selects the classification's anchors; a slot that finds too few above its cut is looked at again, without one.
static void select_by_regressed(ImageWork& work) {
  force_best(work, work.best, kForcedIouOrder, work.quality, work.owner);
  select_owned(work, work.quality, work.owner, work.num_total, work.likely_order);
  bool again = false;
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    work.look_again[slot] = 0;
    if (work.best_by_anchor[slot] == 0) continue;
    const float cut =
        work.best[slot] == 0 ? 0.0f : cut_by_regressed(work, slot, bits_float(key_order(work.best[slot])));
    const int32_t size = work.list_size[slot];
    const bool enough =
        size == work.num_total[slot] && smallest_order(work.keys + work.list_begin[slot], size) >= iou_order(cut);
    if (enough || cut == 0.0f) continue;
    work.look_again[slot] = again = true;
  }
  if (!again) return;
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    if (work.look_again[slot]) work.cut[slot] = 0.0f;
  }
  BoxTile tile;
  for (int64_t i = 0; i < work.num_tiles; ++i) {
    load_regressed_tile(work, i, tile);
    if (!has_slot_to_look_again(work, tile)) continue;
    claim_tile_by_iou(work, tile, i * kTileSize, work.quality, work.owner, work.best,
                      [&](int32_t slot, float) { return work.cut[slot]; });
  }
  force_best(work, work.best, kForcedIouOrder, work.quality, work.owner);
  select_owned(work, work.quality, work.owner, work.num_total, work.likely_order);
}

// Looks for the slot's positives among pairs that can reach the amplified quality of this q_anchor at p = 0.
static void set_positive_bound(ImageWork& work, int32_t slot, float iou, int power) {
  iou_to_compete<1>(&iou, power, &work.may_be_positive_iou[slot]);
  work.enough_order[slot] = exponent_order(det_log2(iou));
  work.likely_order[slot] = work.enough_order[slot] - 1;
}

static void label_classification(ImageWork& work) {
  const DefaultFloatEnvironment environment;
  if (work.num_slots > 0 && work.problem->params.classification_by_regressed) {
    select_by_regressed(work);
    write_classification(work);
  }
  if (work.num_crowds > 0) ignore_crowds(work);

  const MatchParams& params = work.problem->params;
  const int power = compete_power(params.sigma);
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    work.best[slot] = 0;
    const uint64_t best = work.best_by_anchor[slot];
    if (best == 0) continue;
    const float best_iou = bits_float(key_order(best));
    iou_to_compete<1>(&best_iou, power, &work.may_be_best_iou[slot]);
    set_positive_bound(work, slot, work.expected_iou[slot], power);
  }
}

static void claim_by_amplified(ImageWork& work, int64_t tile_begin, int64_t tile_end) {
  if (work.num_slots == 0 || !work.problem->params.localization_by_amplified) return;
  const DefaultFloatEnvironment environment;
  const int power = compete_power(work.problem->params.sigma);
  float least_positive_iou = 1.0f;
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    if (work.best_by_anchor[slot] != 0)
      least_positive_iou = min_float(least_positive_iou, work.may_be_positive_iou[slot]);
  }
  BoxTile own_tile;
  PairBatch pairs;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    claim_tile_by_amplified(work, anchor_tile(work, tile, own_tile), tile, power, least_positive_iou, false, pairs);
  }
  compete(work, pairs);
}

// Whether the bounds of the claim may have kept an anchor from its place. Lowers those of the slots where they may.
static bool lower_bounds(ImageWork& work, int power) {
  bool lowered = false;
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    work.look_again[slot] = 0;
    if (work.best_by_anchor[slot] == 0 || work.may_be_positive_iou[slot] == 0.0f) continue;
    const int32_t size = work.list_size[slot];
    const uint32_t order = smallest_order(work.keys + work.list_begin[slot], size);
    const bool full = size == work.num_pos[slot];
    if (full && order >= work.enough_order[slot]) continue;
    // n_pos anchors reach the exponent found, and more looks only find better ones.
    const float iou = full ? 0.999f * det_exp(bits_float(~order) * 0.693147181f) : 0.0f;
    if (iou > 1e-30f) {
      set_positive_bound(work, slot, iou, power);
    } else {
      work.may_be_positive_iou[slot] = 0.0f;
      work.likely_order[slot] = 0;
    }
    work.look_again[slot] = lowered = true;
  }
  return lowered;
}

// Whether the claim by q_anchor saw all pairs that the bounds of the claim by q_amplified ask for.
static bool anchor_pairs_suffice(const ImageWork& work, int power) {
  if (work.all_anchor_pairs_seen) return true;
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    const uint64_t best = work.best_by_anchor[slot];
    if (best == 0) continue;
    const float cut = cut_by_anchors(work.problem->params, power, bits_float(key_order(best)));
    if (work.may_be_positive_iou[slot] < cut) return false;
  }
  return true;
}

static void label_localization(ImageWork& work) {
  if (work.num_slots == 0 || !work.problem->params.localization_by_amplified) return;
  const DefaultFloatEnvironment environment;
  const int power = compete_power(work.problem->params.sigma);
  force_best(work, work.best, kForcedExponentOrder, work.quality, work.owner);
  select_owned(work, work.quality, work.owner, work.num_pos, work.likely_order);
  while (lower_bounds(work, power)) {
    if (!anchor_pairs_suffice(work, power)) see_all_anchor_pairs(work);
    // Only tiles that such a slot overlaps can change; the owners found before stand, others join them.
    BoxTile own_tile;
    PairBatch pairs;
    for (int64_t tile = 0; tile < work.num_tiles; ++tile) {
      claim_tile_by_amplified(work, anchor_tile(work, tile, own_tile), tile, power, 0.0f, true, pairs);
    }
    compete(work, pairs);
    force_best(work, work.best, kForcedExponentOrder, work.quality, work.owner);
    select_owned(work, work.quality, work.owner, work.num_pos, work.likely_order);
  }
  write_localization(work);
}

}  // namespace

#define MG_OPS_STRING(name) #name
#define MG_OPS_NAME(name) MG_OPS_STRING(name)

MatchKernels match_kernels() {
  return {MG_OPS_NAME(MG_OPS_CPU_TARGET),
          load_anchor_tiles,
          create_work,
          destroy_work,
          begin_image,
          claim_by_anchors,
          count_positives,
          claim_by_regressed,
          label_classification,
          claim_by_amplified,
          label_localization};
}

}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
