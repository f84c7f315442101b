// Dynamic mutual matching of one image on the CPU: the claims of a tile's anchors for both tasks; then each slot's best
// among the anchors that it owns.
//
// A score is read only of a pair that can be the best of its anchor: its IoU times the most that a score amplifies it
// reaches the largest IoU that the anchor has.
#ifndef MG_OPS_CPU_TARGET
#define MG_OPS_CPU_TARGET baseline
#endif

#pragma GCC diagnostic ignored "-Wunused-function"  // of the shared parts this rule uses a few

#include "../dynamic_mutual.h"
#include "image_work.h"

namespace mg_ops {
namespace MG_OPS_CPU_TARGET {
namespace {

// In an image's scratch `quality` and `owner` are the claims of classification, `anchor_quality` and `anchor_owner`
// those of localization.
static const DynamicMutualProblem& problem_of(const ImageWork& work) {
  return *static_cast<const DynamicMutualProblem*>(work.problem);
}

static bool begin_dynamic_mutual(ImageWork& work, int64_t image) {
  const DynamicMutualProblem& problem = problem_of(work);
  const int64_t first = image * problem.num_anchors;
  for (float* qualities : {problem.soft_targets, problem.loc_weights}) {
    std::memset(qualities + first, 0, static_cast<size_t>(problem.num_anchors) * sizeof *qualities);
  }
  return begin_image(work, image);
}

// ---------------------------------------------------------------------------------------------------------------------
// The claims

// The best slot of each anchor of a tile.
struct alignas(64) TileClaims {
  int32_t order[kTileSize];  // at most that of 1.0: signed comparison is exact, and cheap
  int32_t owner[kTileSize];

  void clear() {
    for (int64_t i = 0; i < kTileSize; ++i) {
      order[i] = 0;
      owner[i] = -1;
    }
  }

  void write(uint32_t* quality, int32_t* owners) const {
    std::memcpy(quality, order, sizeof order);
    std::memcpy(owners, owner, sizeof owner);
  }
};

static void ious_of_tile(const ImageWork& work, const BoxTile& tile, int32_t slot, float* iou) {
  const Box object = {work.x1[slot], work.y1[slot], work.x2[slot], work.y2[slot]};
  const float area = work.area[slot];
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    iou[i] = box_iou({tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]}, tile.area[i], object, area);
  }
}

static void claim_by_iou(const ImageWork& work, const BoxTile& tile, TileClaims& claims) {
  for_overlapping_slots(work, tile.bounds, [&](int32_t slot) {
    alignas(64) float iou[kTileSize];
    ious_of_tile(work, tile, slot, iou);
    for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
      const int32_t order = static_cast<int32_t>(iou_order(iou[i]));
      const bool better = order > claims.order[i];  // slots ascend: a tie stays with the lower one
      claims.order[i] = better ? order : claims.order[i];
      claims.owner[i] = better ? slot : claims.owner[i];
    }
  });
}

// The scores of the slot's class of the anchors of a tile that are marked; NaN, which counts as p = 0, of others.
static void load_scores(const ImageWork& work, int32_t slot, int64_t first, const uint8_t* marked, float* result) {
  const FloatInput& scores = work.problem->cls_scores;
  std::fill_n(result, kTileSize, bits_float(0x7fc00000u));
  if (work.label[slot] < 0) {
    return;
  }
  with_type(scores, [&](auto* data) {
    const auto* column =
        data + work.image * scores.image_stride + first * scores.row_stride + work.label[slot] * scores.column_stride;
    for (int64_t i = 0; i < kTileSize; ++i) {
      if (marked[i] != 0) {
        result[i] = to_float(column[i * scores.row_stride]);
      }
    }
  });
}

template <bool kIsProbability>
static void claim_by_amplified(const ImageWork& work, const BoxTile& tile, int64_t first, TileClaims& claims) {
  const float sigma = problem_of(work).sigma, most = most_amplification(problem_of(work));
  alignas(64) float iou[kTileSize], largest[kTileSize] = {}, score[kTileSize];
  alignas(64) uint8_t wanted[kTileSize];
  for_overlapping_slots(work, tile.bounds, [&](int32_t slot) {
    ious_of_tile(work, tile, slot, iou);
    for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
      largest[i] = max_float(largest[i], iou[i]);
    }
  });
  for_overlapping_slots(work, tile.bounds, [&](int32_t slot) {
    ious_of_tile(work, tile, slot, iou);
    uint8_t any = 0;
    for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
      wanted[i] = (iou[i] > 0.0f) & (iou[i] * most >= largest[i]);
      any |= wanted[i];
    }
    if (any == 0) {
      return;
    }
    load_scores(work, slot, first, wanted, score);
    for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
      const float quality = amplified_quality(iou[i], class_probability(score[i], kIsProbability), sigma);
      const int32_t order = static_cast<int32_t>(iou_order(wanted[i] != 0 ? quality : 0.0f));
      const bool better = order > claims.order[i];
      claims.order[i] = better ? order : claims.order[i];
      claims.owner[i] = better ? slot : claims.owner[i];
    }
  });
}

static void claim_tiles(ImageWork& work, int64_t tile_begin, int64_t tile_end) {
  if (work.num_slots == 0) {
    return;
  }
  const DefaultFloatEnvironment environment;
  const DynamicMutualProblem& problem = problem_of(work);
  BoxTile own_tile, predicted;
  TileClaims claims;
  for (int64_t tile_index = tile_begin; tile_index < tile_end; ++tile_index) {
    const int64_t first = tile_index * kTileSize;
    const BoxTile& anchors = anchor_tile(work, tile_index, own_tile);
    claims.clear();
    if (problem.localization_by_amplified && problem.scores_are_probabilities) {
      claim_by_amplified<true>(work, anchors, first, claims);
    } else if (problem.localization_by_amplified) {
      claim_by_amplified<false>(work, anchors, first, claims);
    } else {
      claim_by_iou(work, anchors, claims);
    }
    claims.write(work.anchor_quality + first, work.anchor_owner + first);

    claims.clear();
    if (problem.classification_by_regressed) {
      load_regressed_tile(work, tile_index, predicted);
      claim_by_iou(work, predicted, claims);
    } else {
      claim_by_iou(work, anchors, claims);
    }
    claims.write(work.quality + first, work.owner + first);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What each slot selects

// Brings the keys of the anchors that each slot owns together in work.keys, from list_begin on. False: out of memory.
static bool list_owned(ImageWork& work, const uint32_t* quality, const int32_t* owner) {
  std::fill_n(work.list_size, work.num_slots, 0);
  const int64_t num_anchors = work.problem->num_anchors;
  for (int64_t anchor = 0; anchor < num_anchors; ++anchor) {
    if (owner[anchor] >= 0) {
      ++work.list_size[owner[anchor]];
    }
  }
  int64_t num_owned = 0;
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    work.list_begin[slot] = num_owned;
    num_owned += work.list_size[slot];
    work.list_size[slot] = 0;
  }
  if (!reserve(work.key_block, static_cast<size_t>(num_owned) * sizeof(uint64_t))) {
    return false;
  }
  work.keys = reinterpret_cast<uint64_t*>(work.key_block.memory);
  for (int64_t anchor = 0; anchor < num_anchors; ++anchor) {
    if (owner[anchor] >= 0) {
      const int32_t slot = owner[anchor];
      work.keys[work.list_begin[slot] + work.list_size[slot]++] =
          claim_key(quality[anchor], static_cast<uint32_t>(anchor));
    }
  }
  return true;
}

static bool select_owned(ImageWork& work, const uint32_t* quality, const int32_t* owner, int64_t* match,
                         float* qualities, int32_t* counts) {
  const DynamicMutualProblem& problem = problem_of(work);
  if (!list_owned(work, quality, owner)) {
    return false;
  }
  const int64_t first = work.image * problem.num_anchors;
  const int64_t first_object = load_integer(problem.gt_offsets, work.image);
  const auto is_better = [](uint64_t a, uint64_t b) { return a > b; };
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    const int32_t size = work.list_size[slot], num_best = std::min(size, problem.k);
    if (size == 0) {
      continue;
    }
    uint64_t* keys = work.keys + work.list_begin[slot];
    if (num_best < size) {
      std::nth_element(keys, keys + num_best, keys + size, is_better);
    }
    std::sort(keys, keys + num_best, is_better);
    float total = 0.0f;
    for (int32_t i = 0; i < num_best; ++i) {
      total += bits_float(key_order(keys[i]));
    }
    const int32_t count = count_to_select(total, size);
    for (int32_t i = 0; i < count; ++i) {
      match[first + key_index(keys[i])] = work.object[slot];
      qualities[first + key_index(keys[i])] = bits_float(key_order(keys[i]));
    }
    counts[first_object + work.object[slot]] = count;
  }
  return true;
}

static bool select_both(ImageWork& work) {
  if (work.num_slots == 0) {
    return true;
  }
  const DefaultFloatEnvironment environment;
  const DynamicMutualProblem& problem = problem_of(work);
  return select_owned(work, work.quality, work.owner, problem.cls_match, problem.soft_targets, problem.num_pos) &&
         select_owned(work, work.anchor_quality, work.anchor_owner, problem.loc_match, problem.loc_weights,
                      problem.num_loc_pos);
}

static void label_crowds(ImageWork& work, int64_t tile_begin, int64_t tile_end) {
  const DefaultFloatEnvironment environment;
  ignore_crowds(work, problem_of(work).crowd_overlap, tile_begin, tile_end);
}

}  // namespace

RuleKernels dynamic_mutual_kernels() {
  return {load_anchor_tiles,    create_work, destroy_work,
          begin_dynamic_mutual, count_slots, {{claim_tiles}, {nullptr, select_both}, {label_crowds}}};
}

}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
