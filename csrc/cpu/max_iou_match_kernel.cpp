// Max-IoU matching of one image on the CPU: the claim by the anchors' IoU that mutual matching has (claim.h), then the
// labels.
//
// The claim sees every pair that reaches the least cut of its tile's slots. A slot's cut is at most iou_ignored and, if
// it makes low-quality matches, at most its best IoU. So the owner of an anchor is known where its IoU is at least
// iou_ignored, and where it is a best anchor of some slot; no other anchor needs one.
#ifndef MG_OPS_CPU_TARGET
#define MG_OPS_CPU_TARGET baseline
#endif

#pragma GCC diagnostic ignored "-Wunused-function"  // of the parts of mutual matching, this rule uses a few

#include "../max_iou.h"
#include "claim.h"
#include "rule_kernels.h"

namespace mg_ops {
namespace MG_OPS_CPU_TARGET {
namespace {

static const MaxIouProblem& problem_of(const ImageWork& work) {
  return *static_cast<const MaxIouProblem*>(work.problem);
}

static bool begin_max_iou(ImageWork& work, int64_t image) {
  const MaxIouProblem& problem = problem_of(work);
  fill_row(problem.cls_match + image * problem.num_anchors, problem.num_anchors);
  if (!read_objects(work, image)) {
    return false;
  }
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    work.cut[slot] = problem.low_quality == LowQuality::kNone ? problem.iou_ignored : 0.0f;
  }
  return true;
}

// Tiles run from the last to the first: large objects find good anchors there, and need not look at small ones.
static void claim_by_anchors(ImageWork& work, int64_t tile_begin, int64_t tile_end) {
  if (work.num_slots == 0) {
    return;
  }
  const DefaultFloatEnvironment environment;
  const MaxIouProblem& problem = problem_of(work);
  const float all = problem.low_quality == LowQuality::kNone ? 1.0f : 0.0f;
  BoxTile own_tile;
  for (int64_t tile = tile_end - 1; tile >= tile_begin; --tile) {
    claim_tile_by_iou(work, anchor_tile(work, tile, own_tile), tile * kTileSize, work.anchor_quality, work.anchor_owner,
                      work.best_by_anchor, [&](int32_t, float best_iou) {
                        return min_float(max_float(best_iou, all), problem.iou_ignored);
                      });
  }
}

// Gives the tile's anchors that are best for some slot their labels.
static void label_low_quality(const ImageWork& work, const BoxTile& tile, int64_t first, uint32_t largest,
                              int64_t* label) {
  const MaxIouProblem& problem = problem_of(work);
  for_overlapping_slots(work, tile.bounds, [&](int32_t slot) {  // they ascend: the later one takes
    const uint64_t best = work.best_by_anchor[slot];
    const uint32_t order = key_order(best);
    if (!makes_low_quality_matches(problem, order) || order > largest) {
      return;
    }
    if (problem.low_quality == LowQuality::kTakeFirst) {
      const int64_t i = static_cast<int64_t>(key_index(best)) - first;
      if (i >= 0 && i < kTileSize) {
        label[i] = work.object[slot];
      }
      return;
    }
    if (largest_possible_iou(tile, work, slot) < bits_float(order)) {
      return;
    }
    const Box object = {work.x1[slot], work.y1[slot], work.x2[slot], work.y2[slot]};
    const float area = work.area[slot];
    alignas(64) uint32_t is_best[kTileSize];
    uint32_t any = 0;
    for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
      const float iou = box_iou({tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]}, tile.area[i], object, area);
      is_best[i] = iou_order(iou) == order ? 1 : 0;
      any |= is_best[i];
    }
    if (any == 0) {
      return;
    }
    const bool keep = problem.low_quality == LowQuality::kKeepOwner;
    for (int64_t i = 0; i < kTileSize; ++i) {
      if (is_best[i] != 0) {
        label[i] = work.object[keep ? work.anchor_owner[first + i] : slot];
      }
    }
  });
}

static void label_tiles(ImageWork& work, int64_t tile_begin, int64_t tile_end) {
  if (work.num_slots == 0 && work.num_crowds == 0) {
    return;
  }
  const DefaultFloatEnvironment environment;
  const MaxIouProblem& problem = problem_of(work);
  const uint32_t ignored = iou_order(problem.iou_ignored);
  uint32_t least_best = ~uint32_t{0};
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    const uint32_t order = key_order(work.best_by_anchor[slot]);
    least_best = makes_low_quality_matches(problem, order) ? std::min(least_best, order) : least_best;
  }
  int64_t* row = problem.cls_match + work.image * problem.num_anchors;
  int32_t* num_pos = problem.num_pos + load_integer(problem.gt_offsets, work.image);
  BoxTile own_tile;
  for (int64_t tile_index = tile_begin; tile_index < tile_end; ++tile_index) {
    const int64_t first = tile_index * kTileSize;
    const uint32_t* quality = work.anchor_quality + first;
    const int32_t* owner = work.anchor_owner + first;
    const uint32_t largest = work.num_slots == 0 ? 0 : largest_order(quality);
    const bool by_threshold = largest >= ignored, low_quality = largest != 0 && largest >= least_best;
    if (!by_threshold && !low_quality && work.num_crowds == 0) {
      continue;
    }
    alignas(64) int64_t label[kTileSize];
    for (int64_t i = 0; i < kTileSize; ++i) {
      label[i] = by_threshold && quality[i] >= ignored ? label_by_threshold(problem, quality[i], work.object[owner[i]])
                                                       : kBackground;
    }
    bool any = by_threshold || low_quality;
    if (low_quality || work.num_crowds > 0) {
      const BoxTile& tile = anchor_tile(work, tile_index, own_tile);
      if (low_quality) {
        label_low_quality(work, tile, first, largest, label);
      }
      alignas(64) int32_t covered[kTileSize];
      if (find_covered(work, tile, problem.crowd_overlap, covered)) {
        any = true;
        for (int64_t i = 0; i < kTileSize; ++i) {
          label[i] = covered[i] != 0 && label[i] == kBackground ? kIgnored : label[i];
        }
      }
    }
    if (!any) {
      continue;
    }
    const int64_t count = tile_count(problem, tile_index);
    std::memcpy(row + first, label, static_cast<size_t>(count) * sizeof *label);
    for (int64_t i = 0; i < count; ++i) {
      if (label[i] >= 0) {
        __atomic_fetch_add(num_pos + label[i], 1, __ATOMIC_RELAXED);
      }
    }
  }
}

}  // namespace

RuleKernels max_iou_kernels() {
  return {load_anchor_tiles, create_work, destroy_work,
          begin_max_iou,     count_slots, {{claim_by_anchors}, {label_tiles}}};
}

}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
