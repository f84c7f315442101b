// Mutual matching of one image on the CPU: three claims (by the anchors' IoU, the regressed boxes' IoU, the amplified
// IoU), each one pass over tiles of 64 boxes, then a selection of the best anchors of each object. This file has the
// steps in their order. tile.h, image_work.h, claim.h and select.h are parts of it, in the order they build upon each
// other; claim.h says what is skipped.
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
#ifndef MG_OPS_CPU_TARGET
#define MG_OPS_CPU_TARGET baseline
#endif

#include "claim.h"
#include "rule_kernels.h"
#include "select.h"

namespace mg_ops {
namespace MG_OPS_CPU_TARGET {
namespace {

// Tiles run from the last to the first: detectors list their small anchors, which are most, first. Large objects have
// found good anchors by then, and need not look at the small ones.
static void claim_by_anchors(ImageWork& work, int64_t tile_begin, int64_t tile_end) {
  if (work.num_slots == 0) {
    return;
  }
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

// Counts the anchors that each slot owns with enough q_anchor, and the least q_anchor among those of n_pos.
static void count_owned(ImageWork& work) {
  const MatchParams& params = work.problem->params;
  const int32_t num_slots = work.num_slots;
  for (int32_t slot = 0; slot < num_slots; ++slot) {
    work.num_pos[slot] = work.num_total[slot] = 0;
    work.expected_iou[slot] = bits_float(key_order(work.best_by_anchor[slot]));
    // Overlapped by no anchor, it takes no part from here on.
    if (work.best_by_anchor[slot] == 0) {
      set_box_that_nothing_overlaps(work, slot);
    }
  }
  const uint32_t positive = iou_order(params.iou_positive), ignored = iou_order(params.iou_ignored);
  for (int64_t tile = 0; tile < work.num_tiles; ++tile) {
    const uint32_t* quality = work.anchor_quality + tile * kTileSize;
    const int32_t* owner = work.anchor_owner + tile * kTileSize;
    if (largest_order(quality) < ignored) {
      continue;
    }
    for (int64_t i = 0; i < kTileSize; ++i) {
      if (quality[i] < ignored || owner[i] < 0) {
        continue;
      }
      work.num_total[owner[i]] += 1;
      if (quality[i] < positive) {
        continue;
      }
      work.num_pos[owner[i]] += 1;
      work.expected_iou[owner[i]] = min_float(work.expected_iou[owner[i]], bits_float(quality[i]));
    }
  }
}

// Makes the counts those of the definition, writes them, and gives each slot room for a list of that many anchors.
// False: out of memory.
static bool write_counts_and_place_lists(ImageWork& work, bool& some_own_too_few) {
  const MatchProblem& problem = *work.problem;
  const uint32_t ignored = iou_order(problem.params.iou_ignored);
  const int32_t num_slots = work.num_slots;
  const int64_t begin = load_integer(problem.gt_offsets, work.image);
  int64_t num_keys = 0;
  some_own_too_few = false;
  for (int32_t slot = 0; slot < num_slots; ++slot) {
    work.list_begin[slot] = num_keys;
    work.likely_order[slot] = 0;
    if (work.best_by_anchor[slot] == 0) {
      continue;
    }
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
  const bool enough_memory = reserve(work.key_block, static_cast<size_t>(num_keys) * sizeof(uint64_t));
  work.keys = reinterpret_cast<uint64_t*>(work.key_block.memory);
  return enough_memory;
}

// Writes the labels of the tasks that rank by q_anchor.
static void label_by_anchors(ImageWork& work, bool some_own_too_few) {
  const MatchParams& params = work.problem->params;
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
}

// Counts, the labels that follow from q_anchor alone, and a clean start for the next claim. False: out of memory.
static bool finish_claim_by_anchors(ImageWork& work) {
  if (work.num_slots == 0) {
    return true;
  }
  const DefaultFloatEnvironment environment;
  force_anchors(work);
  count_owned(work);
  bool some_own_too_few = false;
  if (!write_counts_and_place_lists(work, some_own_too_few)) {
    return false;
  }
  label_by_anchors(work, some_own_too_few);
  unforce_anchors(work);
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    work.best[slot] = 0;
    work.cut[slot] = 0.0f;
  }
  return true;
}

static void claim_by_regressed(ImageWork& work, int64_t tile_begin, int64_t tile_end) {
  if (work.num_slots == 0 || !work.problem->params.classification_by_regressed) {
    return;
  }
  const DefaultFloatEnvironment environment;
  BoxTile tile;
  const bool few_slots = work.num_slots <= TileSlots::kCapacity;  // of many, one reaches almost every tile
  float cut = 0.0f;
  for (int64_t i = tile_end - 1; i >= tile_begin; --i) {
    if (i - kTilesAhead >= tile_begin) {
      prefetch_predictions(work, i - kTilesAhead);
    }
    if (i % kTilesAhead == 0) {
      cut = least_cut(work);
    }
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
    if (work.best_by_anchor[slot] == 0) {
      continue;
    }
    const float cut =
        work.best[slot] == 0 ? 0.0f : cut_by_regressed(work, slot, bits_float(key_order(work.best[slot])));
    const int32_t size = work.list_size[slot];
    const bool enough =
        size == work.num_total[slot] && smallest_order(work.keys + work.list_begin[slot], size) >= iou_order(cut);
    if (enough || cut == 0.0f) {
      continue;
    }
    work.look_again[slot] = again = true;
  }
  if (!again) {
    return;
  }
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    if (work.look_again[slot]) {
      work.cut[slot] = 0.0f;
    }
  }
  BoxTile tile;
  for (int64_t i = 0; i < work.num_tiles; ++i) {
    load_regressed_tile(work, i, tile);
    if (!has_slot_to_look_again(work, tile)) {
      continue;
    }
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

// Sets the bounds of the claim by q_amplified.
static void bound_claim_by_amplified(ImageWork& work) {
  const int power = compete_power(work.problem->params.sigma);
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    work.best[slot] = 0;
    const uint64_t best = work.best_by_anchor[slot];
    if (best == 0) {
      continue;
    }
    const float best_iou = bits_float(key_order(best));
    iou_to_compete<1>(&best_iou, power, &work.may_be_best_iou[slot]);
    set_positive_bound(work, slot, work.expected_iou[slot], power);
  }
}

// The labels of classification, crowd regions among them, and the bounds of the next claim.
static bool finish_claim_by_regressed(ImageWork& work) {
  const DefaultFloatEnvironment environment;
  if (work.num_slots > 0 && work.problem->params.classification_by_regressed) {
    select_by_regressed(work);
    write_classification(work);
  }
  if (work.num_crowds > 0) {
    ignore_crowds(work, work.problem->params.crowd_overlap, 0, work.num_tiles);
  }
  bound_claim_by_amplified(work);
  return true;
}

static void claim_by_amplified(ImageWork& work, int64_t tile_begin, int64_t tile_end) {
  if (work.num_slots == 0 || !work.problem->params.localization_by_amplified) {
    return;
  }
  const DefaultFloatEnvironment environment;
  const int power = compete_power(work.problem->params.sigma);
  float least_positive_iou = 1.0f;
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    if (work.best_by_anchor[slot] != 0) {
      least_positive_iou = min_float(least_positive_iou, work.may_be_positive_iou[slot]);
    }
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
    if (work.best_by_anchor[slot] == 0 || work.may_be_positive_iou[slot] == 0.0f) {
      continue;
    }
    const int32_t size = work.list_size[slot];
    const uint32_t order = smallest_order(work.keys + work.list_begin[slot], size);
    const bool full = size == work.num_pos[slot];
    if (full && order >= work.enough_order[slot]) {
      continue;
    }
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
  if (work.all_anchor_pairs_seen) {
    return true;
  }
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    const uint64_t best = work.best_by_anchor[slot];
    if (best == 0) {
      continue;
    }
    const float cut = cut_by_anchors(work.problem->params, power, bits_float(key_order(best)));
    if (work.may_be_positive_iou[slot] < cut) {
      return false;
    }
  }
  return true;
}

// The labels of localization.
static bool finish_claim_by_amplified(ImageWork& work) {
  if (work.num_slots == 0 || !work.problem->params.localization_by_amplified) {
    return true;
  }
  const DefaultFloatEnvironment environment;
  const int power = compete_power(work.problem->params.sigma);
  force_best(work, work.best, kForcedExponentOrder, work.quality, work.owner);
  select_owned(work, work.quality, work.owner, work.num_pos, work.likely_order);
  while (lower_bounds(work, power)) {
    if (!anchor_pairs_suffice(work, power)) {
      see_all_anchor_pairs(work);
    }
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
  return true;
}

}  // namespace

RuleKernels mutual_match_kernels() {
  return {load_anchor_tiles,
          create_work,
          destroy_work,
          begin_image,
          count_slots,
          {{claim_by_anchors},
           {nullptr, finish_claim_by_anchors},
           {claim_by_regressed},
           {nullptr, finish_claim_by_regressed},
           {claim_by_amplified},
           {nullptr, finish_claim_by_amplified}}};
}

}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
