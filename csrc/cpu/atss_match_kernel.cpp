// ATSS of one image on the CPU: each slot finds its candidates and its positives, then the positives claim their
// anchors, slot by slot.
//
// The centers of the anchors are kept by level in groups of 32 with a box around each group. The distance of an
// object's center to that box, computed as that to an anchor's center is, is never above that to a center inside:
// rounding keeps the order. So a group whose box is farther away than the k-th nearest anchor so far has none that is
// nearer, ties included.
#ifndef MG_OPS_CPU_TARGET
#define MG_OPS_CPU_TARGET baseline
#endif

#pragma GCC diagnostic ignored "-Wunused-function"  // of the shared parts this rule uses a few

#include "../atss.h"
#include "ranked.h"

namespace mg_ops {

// An image's scratch, with the centers of the anchors by groups in rule_block.
struct AtssWork : RankedWork {
  int64_t group_begin[kMaxLevels + 1];  // groups [group_begin[l], group_begin[l + 1]) are of level l
  float *center_x, *center_y;           // by group
  float *left, *top, *right, *bottom;   // around the centers of each group
  uint32_t* claim;                      // per anchor that has a label: its IoU with the slot that it belongs to
};

namespace MG_OPS_CPU_TARGET {
namespace {

constexpr int64_t kGroupSize = 32;

static const AtssProblem& problem_of(const ImageWork& work) { return *static_cast<const AtssProblem*>(work.problem); }

// ---------------------------------------------------------------------------------------------------------------------
// Centers

// Returns how many bytes the arrays of all groups and anchors need.
static size_t place_centers(AtssWork& work, char* memory) {
  const int64_t num_groups = work.group_begin[problem_of(work).num_levels];
  Placing placing{memory};
  placing.place(work.center_x, num_groups * kGroupSize);
  placing.place(work.center_y, num_groups * kGroupSize);
  placing.place(work.left, num_groups);
  placing.place(work.top, num_groups);
  placing.place(work.right, num_groups);
  placing.place(work.bottom, num_groups);
  placing.place(work.claim, work.problem->num_anchors);
  return placing.bytes;
}

// The centers of a group of `count` anchors from `first` on. No bound needs to hold those that are nowhere.
static void load_group(AtssWork& work, int64_t group, int64_t first, int64_t count) {
  Box bounds = {kMaxFloat, kMaxFloat, -kMaxFloat, -kMaxFloat};
  for (int64_t i = 0; i < kGroupSize; ++i) {
    const Point center = i < count ? box_center(load_box(work.problem->anchors, first + i)) : kNowhere;
    work.center_x[group * kGroupSize + i] = center.x;
    work.center_y[group * kGroupSize + i] = center.y;
    if (center.x != kNowhere.x) {
      bounds.x1 = min_float(bounds.x1, center.x);
      bounds.y1 = min_float(bounds.y1, center.y);
      bounds.x2 = max_float(bounds.x2, center.x);
      bounds.y2 = max_float(bounds.y2, center.y);
    }
  }
  work.left[group] = bounds.x1;
  work.top[group] = bounds.y1;
  work.right[group] = bounds.x2;
  work.bottom[group] = bounds.y2;
}

static int64_t groups_of_level(const AtssProblem& problem, int32_t level) {
  return (problem.level_begin[level + 1] - problem.level_begin[level] + kGroupSize - 1) / kGroupSize;
}

static void load_groups(AtssWork& work) {
  const DefaultFloatEnvironment environment;
  const AtssProblem& problem = problem_of(work);
  for (int32_t level = 0; level < problem.num_levels; ++level) {
    for (int64_t group = work.group_begin[level]; group < work.group_begin[level + 1]; ++group) {
      const int64_t first = problem.level_begin[level] + (group - work.group_begin[level]) * kGroupSize;
      load_group(work, group, first, std::min(kGroupSize, problem.level_begin[level + 1] - first));
    }
  }
}

static ImageWork* create_atss(const MatchProblem& problem, const BoxTile* anchor_tiles) {
  AtssWork* work = new_work<AtssWork>(problem, anchor_tiles);
  if (work == nullptr) {
    return nullptr;
  }
  for (int32_t level = 0; level < problem_of(*work).num_levels; ++level) {
    work->group_begin[level + 1] = work->group_begin[level] + groups_of_level(problem_of(*work), level);
  }
  if (!reserve(work->rule_block, place_centers(*work, nullptr))) {
    destroy_ranked(work);
    return nullptr;
  }
  place_centers(*work, work->rule_block.memory);
  load_groups(*work);
  return work;
}

// ---------------------------------------------------------------------------------------------------------------------
// The candidates of a slot

// The nearest anchors so far, by nearest_key, the nearest first.
struct Nearest {
  int32_t wanted, count;
  uint32_t farthest;  // no anchor at a larger distance is among them
  uint64_t* keys;
};

MG_OPS_INLINE void insert(Nearest& nearest, uint64_t key) {
  if (nearest.count == nearest.wanted) {
    if (key >= nearest.keys[nearest.count - 1]) {
      return;
    }
    --nearest.count;
  }
  int32_t place = nearest.count++;
  for (; place > 0 && nearest.keys[place - 1] > key; --place) {
    nearest.keys[place] = nearest.keys[place - 1];
  }
  nearest.keys[place] = key;
}

// Merges the `count` anchors of the group that are not farther than the farthest; the others have distance kNotNear.
constexpr int32_t kNotNear = 0x7ffffffe;

static void merge(Nearest& nearest, const int32_t* distance, int64_t first, int32_t count) {
  // Each anchor's place among those of its group: how many come before it.
  alignas(64) int32_t place[kGroupSize] = {};
  for (int32_t other = 0; other < kGroupSize; ++other) {
    for (int32_t i = 0; i < kGroupSize; ++i) {  // vector loop
      place[i] += distance[other] < distance[i] + (other < i ? 1 : 0) ? 1 : 0;
    }
  }
  uint64_t sorted[kGroupSize + 1];
  for (int64_t i = 0; i < kGroupSize; ++i) {
    sorted[place[i]] = nearest_key(static_cast<uint32_t>(distance[i]), static_cast<uint32_t>(first + i));
  }
  if (nearest.count == 0) {  // as of the first group of each level
    nearest.count = std::min(nearest.wanted, count);
    std::memcpy(nearest.keys, sorted, static_cast<size_t>(nearest.count) * sizeof *sorted);
    return;
  }
  uint64_t before[kMaxK + 1];
  std::memcpy(before, nearest.keys, static_cast<size_t>(nearest.count) * sizeof *before);
  sorted[count] = before[nearest.count] = ~uint64_t{0};
  nearest.count = std::min(nearest.wanted, nearest.count + count);
  const uint64_t *mine = before, *theirs = sorted;
  for (int32_t i = 0; i < nearest.count; ++i) {
    const bool is_mine = *mine < *theirs;
    nearest.keys[i] = is_mine ? *mine : *theirs;
    mine += is_mine ? 1 : 0;
    theirs += is_mine ? 0 : 1;
  }
}

// Looks at the `count` anchors of a group, the first of which is number `first`.
static void visit_group(const AtssWork& work, const Point& center, int64_t group, int64_t first, int64_t count,
                        Nearest& nearest) {
  const float *x = work.center_x + group * kGroupSize, *y = work.center_y + group * kGroupSize;
  alignas(64) int32_t distance[kGroupSize];
  const uint32_t farthest = nearest.farthest, exist = static_cast<uint32_t>(std::min(count, kGroupSize));
  uint32_t num_near = 0;
  for (uint32_t i = 0; i < kGroupSize; ++i) {  // vector loop
    const uint32_t order = distance_order(x[i] - center.x, y[i] - center.y);
    const bool is_near = (order <= farthest) & (i < exist);
    distance[i] = is_near ? static_cast<int32_t>(order) : kNotNear;
    num_near += is_near ? 1u : 0u;
  }
  constexpr uint32_t kFew = 10;
  if (num_near > kFew) {
    merge(nearest, distance, first, static_cast<int32_t>(num_near));
  } else if (num_near > 0) {
    for (int64_t i = 0; i < kGroupSize; ++i) {
      if (distance[i] != kNotNear) {
        insert(nearest, nearest_key(static_cast<uint32_t>(distance[i]), static_cast<uint32_t>(first + i)));
      }
    }
  }
  if (nearest.count == nearest.wanted) {
    nearest.farthest = key_order(nearest.keys[nearest.count - 1]);
  }
}

// Finds the candidates of a level.
static void find_nearest(const AtssWork& work, int32_t level, const Point& center, Nearest& nearest) {
  constexpr int64_t kPart = 1024;  // groups whose bounds are at hand at a time
  const int64_t level_begin = problem_of(work).level_begin[level];
  const int64_t level_size = problem_of(work).level_begin[level + 1] - level_begin;
  alignas(64) uint32_t bound[kPart];
  for (int64_t part = work.group_begin[level]; part < work.group_begin[level + 1]; part += kPart) {
    const int64_t count = std::min(kPart, work.group_begin[level + 1] - part);
    const float *left = work.left + part, *top = work.top + part;
    const float *right = work.right + part, *bottom = work.bottom + part;
    uint32_t least = ~uint32_t{0};
    for (int64_t i = 0; i < count; ++i) {  // vector loop
      bound[i] = least_distance_order(center, {left[i], top[i], right[i], bottom[i]});
      least = bound[i] < least ? bound[i] : least;
    }
    const auto visit = [&](int64_t i) {
      if (bound[i] <= nearest.farthest) {
        const int64_t first = (part + i - work.group_begin[level]) * kGroupSize;
        visit_group(work, center, part + i, level_begin + first, level_size - first, nearest);
      }
    };
    // From the nearest group outward: the nearest anchors are found soon, and most groups need not be visited.
    int64_t start = 0;
    while (bound[start] != least) {
      ++start;
    }
    visit(start);
    const int64_t farthest_group = std::max(start, count - 1 - start);
    for (int64_t step = 1; step <= farthest_group; ++step) {
      if (start - step >= 0) {
        visit(start - step);
      }
      if (start + step < count) {
        visit(start + step);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The steps

static bool begin_atss(ImageWork& work, int64_t image) {
  return begin_ranked(ranked(work), image, candidates_of_object(problem_of(work)));
}

// The boxes of up to 64 candidates; behind the last one empty ones.
static void load_candidates(const AtssProblem& problem, const uint64_t* candidates, int64_t count, BoxTile& boxes) {
  for (int64_t i = 0; i < kTileSize; ++i) {
    const Box box = i < count ? load_box(problem.anchors, static_cast<uint32_t>(candidates[i])) : Box{};
    boxes.x1[i] = box.x1;
    boxes.y1[i] = box.y1;
    boxes.x2[i] = box.x2;
    boxes.y2[i] = box.y2;
  }
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    const Box box = finite_or_empty({boxes.x1[i], boxes.y1[i], boxes.x2[i], boxes.y2[i]});
    boxes.x1[i] = box.x1;
    boxes.y1[i] = box.y1;
    boxes.x2[i] = box.x2;
    boxes.y2[i] = box.y2;
    boxes.area[i] = box_area(box);
  }
}

// The sum of value(iou[i]) for the `count` IoUs, which are readable to the end of a tile.
template <class Value>
MG_OPS_INLINE float sum_values(const float* iou, int32_t count, Value value) {
  alignas(64) float sums[kSumLanes] = {};
  for (int64_t first = 0; first < count; first += kSumLanes) {
    const int32_t left = static_cast<int32_t>(count - first);
// Unrolled it would not become vectors.
#pragma GCC unroll 1
    for (int32_t lane = 0; lane < kSumLanes; ++lane) {  // vector loop
      const float number = value(iou[first + lane]);
      sums[lane] += lane < left ? number : 0.0f;
    }
  }
  return add_lanes(sums);
}

static void select_by_iou(ImageWork& image_work, int64_t slot_begin, int64_t slot_end) {
  const DefaultFloatEnvironment environment;
  AtssWork& work = static_cast<AtssWork&>(image_work);
  const AtssProblem& problem = problem_of(work);
  const int32_t num_candidates = candidates_of_object(problem);
  uint64_t candidates[kMaxCandidates];
  alignas(64) float iou[kMaxCandidates];  // of whole tiles
  BoxTile boxes;
  for (int64_t slot = slot_begin; slot < slot_end; ++slot) {
    const Box object = object_of(work, slot);
    const float area = work.area[slot];
    int32_t found = 0;
    for (int32_t level = 0; level < problem.num_levels; ++level) {
      Nearest nearest = {candidates_of_level(problem, level), 0, kInfiniteDistance, candidates + found};
      if (nearest.wanted > 0) {
        find_nearest(work, level, object_center(object), nearest);
        found += nearest.count;
      }
    }
    for (int32_t first = 0; first < num_candidates; first += kTileSize) {
      load_candidates(problem, candidates + first, std::min<int64_t>(kTileSize, num_candidates - first), boxes);
      for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
        iou[first + i] = box_iou({boxes.x1[i], boxes.y1[i], boxes.x2[i], boxes.y2[i]}, boxes.area[i], object, area);
      }
    }
    const float threshold = mean_plus_deviation(
        iou, num_candidates, [](const float* of, int32_t count, auto value) { return sum_values(of, count, value); });
    uint64_t* selected = work.selected + slot * work.list_stride;
    int32_t count = 0;
    for (int32_t i = 0; i < num_candidates; ++i) {
      const uint32_t anchor = static_cast<uint32_t>(candidates[i]);
      if (reaches(iou[i], threshold) && passes_center_test(problem, load_box(problem.anchors, anchor), object)) {
        selected[count++] = claim_key(iou_order(iou[i]), anchor);
      }
    }
    work.num_selected[slot] = count;
  }
}

// Gives each anchor that some slot selected to the one of the largest IoU; on a tie the earlier slot keeps it.
static bool label_positives(ImageWork& image_work) {
  AtssWork& work = static_cast<AtssWork&>(image_work);
  const AtssProblem& problem = problem_of(work);
  int64_t* row = problem.cls_match + work.image * problem.num_anchors;
  int32_t* num_pos = problem.num_pos + load_integer(problem.gt_offsets, work.image);
  for_selected(work, [&](int32_t slot, uint32_t anchor, int64_t place) {
    const uint32_t iou = key_order(work.selected[place]);
    if (row[anchor] == kBackground || iou > work.claim[anchor]) {
      row[anchor] = work.object[slot];
      work.claim[anchor] = iou;
    }
  });
  for_selected(work, [&](int32_t slot, uint32_t anchor, int64_t) {
    num_pos[work.object[slot]] += row[anchor] == work.object[slot] ? 1 : 0;
  });
  return true;
}

static void label_crowds(ImageWork& work, int64_t tile_begin, int64_t tile_end) {
  const DefaultFloatEnvironment environment;
  ignore_crowds(work, problem_of(work).crowd_overlap, tile_begin, tile_end);
}

}  // namespace

RuleKernels atss_kernels() {
  return {load_anchor_tiles, create_atss,
          destroy_ranked,    begin_atss,
          count_slots,       {{nullptr, nullptr, select_by_iou}, {nullptr, label_positives}, {label_crowds}}};
}

}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
