// The claims: which slot each box belongs to, and which box each slot likes best. Part of mutual_match_kernel.cpp.
//
// What may be skipped, and why the answer is the same
//
// Of all pairs a slot needs its best anchor and the few anchors that rank first among those it owns. The rest is
// skipped where a bound shows that it cannot matter, or where a guess says so that is verified afterwards.
//
// 1. Tiles. largest_possible_iou bounds the IoU of a slot with any box of a tile, by the box around the tile and the
//    range of its areas. bound_regressed_tile gives both for regressed boxes before they are decoded.
// 2. Pairs below the cuts, in the claims by IoU. A slot has no use for pairs below its `cut`: its best anchor and those
//    that it needs lie above. Every pair that reaches the least cut of its tile's slots is seen, so that whoever owns
//    its box is known. What lies below is seen or not, and does not matter. Cuts rise as better pairs are found; an old
//    one is only more careful. By q_anchor the cut is what counts and what step 3 looks at (cut_by_anchors). By
//    q_regressed it is a guess (cut_by_regressed): select_by_regressed looks again, without a cut, at a slot that finds
//    too few anchors above its own.
// 3. Scores, in the claim by q_amplified. As q <= q_amplified <= q ** ((sigma - 1) / sigma), a pair can reach the
//    amplified quality of one of IoU q only if its own IoU is at least q ** (sigma / (sigma - 1)): iou_to_compete. So a
//    slot's best pair has an IoU of at least may_be_best_iou. An anchor matters if some slot may take it as a positive:
//    their IoU is at least may_be_positive_iou, which is a guess from the IoU that n_pos anchors of the slot have. Of
//    an anchor that matters every pair that could own it is evaluated; one that does not is left without an owner.
//    lower_bounds verifies the guess: where a slot has fewer than n_pos anchors, or one below enough_order, which a
//    skipped anchor could reach, the bound is lowered and the slot looked at again. see_all_anchor_pairs repeats the
//    claim by q_anchor if its cuts were above that bound.
//
// Bounds have margins above any rounding: 1e-5 of an IoU, 1e-3 where boxes are not decoded, kBoundMargin between IoUs
// and exponents. tests/test_bounds_change_nothing.py compares with brute force.
#pragma once

#include <type_traits>

#include "image_work.h"

namespace mg_ops {
namespace MG_OPS_CPU_TARGET {
namespace {

// Positives are looked for among pairs of at least this share of the IoU they should have.
constexpr float kExpectedShare = 0.8f;
// The margin of bounds between qualities: 1% of an IoU is 0.0145 in log2, and exponents err by less than 1e-4 for every
// float.
constexpr float kBoundMargin = 0.99f;
constexpr int kMaxBoundPower = 32;

// Raises a best-anchor key shared by the threads of an image; whether it was raised. The largest key wins in any order.
MG_OPS_INLINE bool raise_key(uint64_t* shared, uint64_t key) {
  uint64_t current = __atomic_load_n(shared, __ATOMIC_RELAXED);
  while (key > current) {
    if (__atomic_compare_exchange_n(shared, &current, key, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      return true;
    }
  }
  return false;
}

// One tile under an IoU quality: the best slot of each of its boxes, and the best box of each slot, for pairs that
// reach the least cut of the tile's slots. `next_cut(slot, iou)` is the cut that follows from a best IoU found so far.
template <class NextCut>
MG_OPS_INLINE void claim_tile_by_iou(ImageWork& work, const BoxTile& tile, int64_t first, uint32_t* quality,
                                     int32_t* owner, uint64_t* best, NextCut next_cut) {
  alignas(64) int32_t tile_quality[kTileSize] = {};
  alignas(64) int32_t tile_owner[kTileSize];
  for (int64_t i = 0; i < kTileSize; ++i) {
    tile_owner[i] = -1;
  }
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
          while (order[i] != largest) {
            ++i;
          }
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

// The q_anchor, at least, that a pair needs to reach the amplified quality that one of this q_anchor
// has at p = 0: q ** (sigma / (sigma - 1)), the exponent rounded up to the whole `power` (0: no bound).
template <int kCount>
MG_OPS_INLINE void iou_to_compete(const float* iou, int power, float* bound) {
  for (int i = 0; i < kCount; ++i) {
    bound[i] = power == 0 ? 0.0f : kBoundMargin;
  }
  for (int step = 0; step < power; ++step) {
    for (int i = 0; i < kCount; ++i) {
      bound[i] *= iou[i];
    }
  }
  for (int i = 0; i < kCount; ++i) {
    bound[i] = bound[i] < 1e-30f ? 0.0f : bound[i];
  }
}

MG_OPS_INLINE int compete_power(float sigma) {
  const float power = sigma / (sigma - 1.0f);  // above 1; inf where sigma is 1 in float32, which is refused
  if (!(power <= static_cast<float>(kMaxBoundPower))) {
    return 0;
  }
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
  int64_t score[kCapacity];  // where its score lies; negative for an unknown label
  alignas(64) float iou[kCapacity];
  alignas(64) float value[kCapacity];  // of its score
  alignas(64) uint32_t order[kCapacity];
};

static void evaluate_pairs(PairBatch& pairs, const FloatInput& cls_scores, bool scores_are_probabilities, float sigma) {
  with_type(cls_scores, [&](auto* data) {
    // An unknown label has p = 0, which is what a NaN score stands for.
    const float unknown = bits_float(0x7fc00000u);
    for (int i = 0; i < pairs.size; ++i) {
      pairs.value[i] = pairs.score[i] < 0 ? unknown : to_float(data[pairs.score[i]]);
    }
  });
  const int padded = (pairs.size + 15) & ~15;
  for (int i = pairs.size; i < padded; ++i) {
    pairs.iou[i] = 1.0f;
    pairs.value[i] = 0.0f;
  }
  // A loop for each kind of score: with a choice inside it would not be vectorized.
  const auto evaluate = [&](auto are_probabilities) {
    for (int i = 0; i < padded; ++i) {  // vector loop
      const float p = class_probability(pairs.value[i], are_probabilities.value);
      pairs.order[i] = exponent_order(amplified_exponent(det_log2(pairs.iou[i]), p, sigma));
    }
  };
  if (scores_are_probabilities) {
    evaluate(std::true_type{});
  } else {
    evaluate(std::false_type{});
  }
}

// Evaluates the pairs gathered, lets them compete for their anchors and to be their slots' best, and empties the batch.
static void compete(ImageWork& work, PairBatch& pairs) {
  const MatchProblem& problem = *work.problem;
  evaluate_pairs(pairs, problem.cls_scores, problem.scores_are_probabilities, problem.params.sigma);
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

// One tile under q_amplified: gathers the pairs whose scores can matter, and leaves anchors that do not matter without
// an owner. With only_again, tiles without a slot to look at again stay as they are.
static void claim_tile_by_amplified(ImageWork& work, const BoxTile& tile, int64_t tile_index, int power,
                                    float least_positive_iou, bool only_again, PairBatch& pairs) {
  constexpr int32_t kKept = 32;  // slots whose IoUs stay at hand between the two looks at them
  const MatchProblem& problem = *work.problem;
  const int64_t first = tile_index * kTileSize;
  const uint32_t* anchor_quality = work.anchor_quality + first;

  if (only_again && !has_slot_to_look_again(work, tile)) {
    return;
  }
  for (int64_t i = 0; i < kTileSize; ++i) {
    work.quality[first + i] = 0;
  }
  for (int64_t i = 0; i < kTileSize; ++i) {
    work.owner[first + i] = -1;
  }
  const float largest_anchor_iou = bits_float(largest_order(anchor_quality));
  if (largest_anchor_iou == 0.0f || largest_anchor_iou < least_positive_iou) {
    return;
  }
  TileSlots slots;
  list_slots(work, tile, work.may_be_positive_iou, slots);
  if (largest_anchor_iou < slots.least_cut) {
    return;
  }

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
    if (position < kKept) {
      kept[position] = true;
    }
    tile_iou(slot, iou);
    const float threshold = work.may_be_positive_iou[slot];
    for (int64_t i = 0; i < kTileSize; ++i) {
      matters[i] |= (iou[i] > 0.0f) & (iou[i] >= threshold);
    }
  });
  int32_t any = 0;
  for (int64_t i = 0; i < kTileSize; ++i) {
    any |= matters[i];
  }
  if (any == 0) {
    return;
  }
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
    if (pairs.size > PairBatch::kCapacity - kTileSize) {
      compete(work, pairs);
    }
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
    if (work.best_by_anchor[slot] == 0) {
      continue;
    }
    const uint64_t key = best[slot] != 0 ? best[slot] : work.best_by_anchor[slot];
    const uint32_t anchor = key_index(key);
    if (quality[anchor] < forced_order || owner[anchor] > slot) {
      quality[anchor] = forced_order;
      owner[anchor] = slot;
    }
  }
}

// The cut of the claim by q_anchor for an object whose best q_anchor is at least `best_iou`: what counts, and what the
// claim by q_amplified will look at.
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

// The cut of the claim by q_regressed: well below the IoUs of the anchors, since regressed boxes should do no worse.
static float cut_by_regressed(const ImageWork& work, int32_t slot, float best_iou) {
  const float best_anchor_iou = bits_float(key_order(work.best_by_anchor[slot]));
  return min_float(best_iou, kExpectedShare * min_float(best_anchor_iou, work.problem->params.iou_ignored));
}

// The claim by q_anchor once more, without cuts.
static void see_all_anchor_pairs(ImageWork& work) {
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    work.cut[slot] = 0.0f;
  }
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
    if (work.best_by_anchor[slot] == 0) {
      continue;
    }
    const uint32_t anchor = key_index(work.best_by_anchor[slot]);
    work.saved_value[slot] = work.anchor_quality[anchor];
    work.saved_owner[slot] = work.anchor_owner[anchor];
  }
  force_best(work, work.best_by_anchor, kForcedIouOrder, work.anchor_quality, work.anchor_owner);
}

// What q_anchor really is at the forced pairs: the claim by q_amplified bounds from it.
static void unforce_anchors(ImageWork& work) {
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    if (work.best_by_anchor[slot] == 0) {
      continue;
    }
    const uint32_t anchor = key_index(work.best_by_anchor[slot]);
    work.anchor_quality[anchor] = work.saved_value[slot];
    work.anchor_owner[anchor] = work.saved_owner[slot];
  }
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
    if ((words[0] | words[1]) != 0) {
      return true;
    }
  }
  return false;
}

}  // namespace
}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
