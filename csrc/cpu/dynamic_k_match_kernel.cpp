// SimOTA and dynamic soft label matching of one image on the CPU: which anchors are candidates, and the sum over the
// classes of each; then each slot's number of anchors and its cheapest ones; then the anchors that several slots want.
//
// Numbers of anchors that are no candidates are those of some candidate of the tile, so that they widen no bounds;
// their sum is below 0. A pair is left out where its IoU and its place alone cost more than the slot's cheapest ones.
#ifndef MG_OPS_CPU_TARGET
#define MG_OPS_CPU_TARGET baseline
#endif

#pragma GCC diagnostic ignored "-Wunused-function"  // of the shared parts these rules use a few

#include "../dynamic_k.h"
#include "ranked.h"

namespace mg_ops {

// The candidates of a tile of anchors.
struct alignas(64) CandidateTile {
  CenterBounds bounds;
  int32_t count;  // 0: there are none, and nothing else is set
  alignas(64) float x[kTileSize], y[kTileSize], width[kTileSize];
  float sum[kTileSize];  // over the classes; below 0: no candidate
};

struct DynamicKWork : ImageWork {
  // Per tile of anchors (place_candidates): 38 bytes an anchor.
  Block candidate_block;
  CandidateTile* candidates;
  BoxTile* predicted;
  int64_t num_candidates;

  // Per slot (place_selections).
  Block selection_block;
  int32_t* num_selected;
  uint64_t* selected;  // (num_slots, k) the keys of the anchors that each selects, in any order
};

namespace MG_OPS_CPU_TARGET {
namespace {

constexpr float kNoCandidate = -1.0f;

// In the row of the match, while the slots' choices are gathered: -3 - the one slot that wants an anchor, or this.
constexpr int64_t kWantedBySeveral = -2;
MG_OPS_INLINE int64_t wanted_by(int64_t slot) { return -3 - slot; }

static const DynamicKProblem& problem_of(const ImageWork& work) {
  return *static_cast<const DynamicKProblem*>(work.problem);
}

MG_OPS_INLINE DynamicKWork& dynamic_k(ImageWork& work) { return static_cast<DynamicKWork&>(work); }

static size_t place_candidates(DynamicKWork& work, char* memory) {
  Placing placing{memory};
  placing.place(work.candidates, work.num_tiles);
  placing.place(work.predicted, work.num_tiles);
  return placing.bytes;
}

static size_t place_selections(DynamicKWork& work, int64_t k, char* memory) {
  Placing placing{memory};
  placing.place(work.num_selected, work.num_slots);
  placing.place(work.selected, work.num_slots * k);
  return placing.bytes;
}

static void destroy_dynamic_k(ImageWork* work) {
  if (work != nullptr) {
    std::free(dynamic_k(*work).candidate_block.memory);
    std::free(dynamic_k(*work).selection_block.memory);
  }
  destroy_work(work);
}

static ImageWork* create_dynamic_k(const MatchProblem& problem, const BoxTile* anchor_tiles) {
  DynamicKWork* work = new_work<DynamicKWork>(problem, anchor_tiles);
  if (work == nullptr) {
    return nullptr;
  }
  if (!reserve(work->candidate_block, place_candidates(*work, nullptr))) {
    destroy_dynamic_k(work);
    return nullptr;
  }
  place_candidates(*work, work->candidate_block.memory);
  return work;
}

static bool begin_dynamic_k(ImageWork& image_work, int64_t image) {
  DynamicKWork& work = dynamic_k(image_work);
  const DynamicKProblem& problem = problem_of(work);
  fill_row(problem.cls_match + image * problem.num_anchors, problem.num_anchors);
  std::memset(problem.soft_targets + image * problem.num_anchors, 0,
              static_cast<size_t>(problem.num_anchors) * sizeof(float));
  if (!read_objects(work, image) || !reserve(work.selection_block, place_selections(work, problem.k, nullptr))) {
    return false;
  }
  place_selections(work, problem.k, work.selection_block.memory);
  work.num_candidates = 0;
  return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// The candidates

// Sets bounds and the widest of the centers that are marked. Whether there is any.
static bool bound_centers(CandidateTile& tile, const uint8_t* marked) {
  Box box = {kMaxFloat, kMaxFloat, -kMaxFloat, -kMaxFloat};
  float widest = 0.0f;
  tile.count = 0;
  for_marked<kTileSize>(marked, [&](int64_t i) {
    box = {min_float(box.x1, tile.x[i]), min_float(box.y1, tile.y[i]), max_float(box.x2, tile.x[i]),
           max_float(box.y2, tile.y[i])};
    widest = max_float(widest, tile.width[i]);
    ++tile.count;
  });
  tile.bounds = {box, widest};
  return tile.count > 0;
}

// Which anchors of the tile are near some slot's object. Whether any is; then their centers and bounds are set.
template <DynamicKRule kRule>
static bool find_near(const DynamicKWork& work, const BoxTile& anchors, CandidateTile& tile, uint8_t* near) {
  const float center_radius = problem_of(work).center_radius;
  alignas(64) uint8_t exists[kTileSize];
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    const float x = (anchors.x1[i] + anchors.x2[i]) * 0.5f, y = (anchors.y1[i] + anchors.y2[i]) * 0.5f;
    tile.x[i] = x;
    tile.y[i] = y;
    tile.width[i] = anchors.x2[i] - anchors.x1[i];
    exists[i] = (anchors.x2[i] > anchors.x1[i]) & (anchors.y2[i] > anchors.y1[i]) & is_finite(x) & is_finite(y);
  }
  if (!bound_centers(tile, exists)) {
    return false;
  }
  std::memset(near, 0, kTileSize);
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    const Box object = object_of(work, slot);
    if (!can_be_near(tile.bounds, object, kRule, center_radius)) {
      continue;
    }
    for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
      near[i] |= is_near({tile.x[i], tile.y[i]}, tile.width[i], object, kRule, center_radius);
    }
  }
  for (int64_t i = 0; i < kTileSize; ++i) {
    near[i] &= exists[i];
  }
  return bound_centers(tile, near);
}

// Gives the places of a tile that are not marked the number of one that is.
static void fill_unmarked(float* numbers, const uint8_t* marked, float number) {
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    numbers[i] = marked[i] != 0 ? numbers[i] : number;
  }
}

// The sum over the classes of one anchor, in the order of the definition.
template <bool kIsProbability, bool kIsSoft, class T>
static float sum_over_classes(const T* row, int64_t step, int64_t num_classes) {
  alignas(64) float scores[kSumLanes], sums[kSumLanes] = {};
  for (int64_t first = 0; first < num_classes; first += kSumLanes) {
    const int32_t count = static_cast<int32_t>(std::min(kSumLanes, num_classes - first));
    for (int32_t lane = 0; lane < count; ++lane) {
      scores[lane] = to_float(row[(first + lane) * step]);
    }
    for (int32_t lane = count; lane < kSumLanes; ++lane) {
      scores[lane] = 0.0f;
    }
    for (int32_t lane = 0; lane < kSumLanes; ++lane) {  // vector loop
      const float loss = loss_if_other(scores[lane], kIsProbability, kIsSoft);
      sums[lane] += lane < count ? loss : 0.0f;
    }
  }
  return add_lanes(sums);
}

template <bool kIsProbability, bool kIsSoft>
static void sum_of_candidates(const DynamicKWork& work, int64_t first, const uint8_t* marked, float* sums) {
  const FloatInput& scores = work.problem->cls_scores;
  std::fill_n(sums, kTileSize, kNoCandidate);
  with_type(scores, [&](auto* data) {
    const auto* rows = data + work.image * scores.image_stride + first * scores.row_stride;
    for_marked<kTileSize>(marked, [&](int64_t i) {
      sums[i] = sum_over_classes<kIsProbability, kIsSoft>(rows + i * scores.row_stride, scores.column_stride,
                                                          work.problem->num_classes);
    });
  });
}

template <DynamicKRule kRule>
static void find_candidates(ImageWork& image_work, int64_t tile_begin, int64_t tile_end) {
  DynamicKWork& work = dynamic_k(image_work);
  if (work.num_slots == 0) {
    return;
  }
  const DefaultFloatEnvironment environment;
  constexpr bool kIsSoft = kRule == DynamicKRule::kSoftLabel;
  BoxTile own_tile;
  alignas(64) uint8_t near[kTileSize];
  int64_t num_candidates = 0;
  for (int64_t tile_index = tile_begin; tile_index < tile_end; ++tile_index) {
    CandidateTile& tile = work.candidates[tile_index];
    if (!find_near<kRule>(work, anchor_tile(work, tile_index, own_tile), tile, near)) {
      continue;
    }
    num_candidates += tile.count;
    if (work.problem->scores_are_probabilities) {
      sum_of_candidates<true, kIsSoft>(work, tile_index * kTileSize, near, tile.sum);
    } else {
      sum_of_candidates<false, kIsSoft>(work, tile_index * kTileSize, near, tile.sum);
    }
    BoxTile& predicted = work.predicted[tile_index];
    load_regressed_tile(work, tile_index, predicted);
    if (tile.count < kTileSize) {
      const int64_t some = std::find(near, near + kTileSize, uint8_t{1}) - near;
      for (float* numbers : {predicted.x1, predicted.y1, predicted.x2, predicted.y2}) {
        fill_unmarked(numbers, near, numbers[some]);
      }
      finish_tile(predicted, kTileSize);
    }
  }
  __atomic_fetch_add(&work.num_candidates, num_candidates, __ATOMIC_RELAXED);
}

// ---------------------------------------------------------------------------------------------------------------------
// What each slot selects

// IoUs of the predicted boxes of a tile with an object.
static void ious_of_tile(const BoxTile& tile, const Box& object, float area, float* iou) {
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    iou[i] = box_iou({tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]}, tile.area[i], object, area);
  }
}

// How many anchors the slot selects.
static int32_t count_selected(const DynamicKWork& work, int32_t slot, uint64_t* keys) {
  const Box object = object_of(work, slot);
  BestKeys best(problem_of(work).k);
  alignas(64) float iou[kTileSize];
  alignas(64) uint8_t wanted[kTileSize];
  for (int64_t tile_index = 0; tile_index < work.num_tiles; ++tile_index) {
    const CandidateTile& tile = work.candidates[tile_index];
    const BoxTile& predicted = work.predicted[tile_index];
    if (tile.count == 0 || !overlap(predicted.bounds, object) ||
        iou_order(largest_possible_iou(predicted, work, slot)) < key_order(best.floor())) {
      continue;
    }
    ious_of_tile(predicted, object, work.area[slot], iou);
    const float floor = bits_float(key_order(best.floor()));
    for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
      wanted[i] = (iou[i] > floor) & (tile.sum[i] >= 0.0f);
    }
    for_marked<kTileSize>(wanted, [&](int64_t i) {
      best.add(claim_key(iou_order(iou[i]), static_cast<uint32_t>(tile_index * kTileSize + i)));
    });
  }
  const int32_t count = best.take(keys);
  std::sort(keys, keys + count, [](uint64_t a, uint64_t b) { return a > b; });
  float total = 0.0f;
  for (int32_t i = 0; i < count; ++i) {
    total += bits_float(key_order(keys[i]));
  }
  return count_to_select(total, work.num_candidates);
}

// The scores of the slot's class of the anchors of a tile that are marked; of others some number.
static void load_scores(const ImageWork& work, int64_t slot, int64_t first, const uint8_t* marked, float* result) {
  const FloatInput& scores = work.problem->cls_scores;
  std::fill_n(result, kTileSize, kNoScore);
  if (work.label[slot] < 0) {
    return;
  }
  with_type(scores, [&](auto* data) {
    const auto* column =
        data + work.image * scores.image_stride + first * scores.row_stride + work.label[slot] * scores.column_stride;
    for_marked<kTileSize>(marked, [&](int64_t i) { result[i] = to_float(column[i * scores.row_stride]); });
  });
}

// Shows `best` the candidates of a tile that may be among the slot's cheapest ones.
template <DynamicKRule kRule, bool kIsProbability>
static void select_of_tile(const DynamicKWork& work, int32_t slot, int64_t tile_index, BestKeys& best) {
  const DynamicKProblem& problem = problem_of(work);
  const CandidateTile& tile = work.candidates[tile_index];
  const Box object = object_of(work, slot);
  const float epsilon = problem.epsilon, penalty = problem.penalty, center_radius = problem.center_radius;
  const float iou_weight = problem.iou_weight, cls_weight = problem.cls_weight;
  const uint32_t floor = key_order(best.floor());
  alignas(64) float iou[kTileSize], of_iou[kTileSize], of_place[kTileSize], score[kTileSize];
  alignas(64) uint32_t order[kTileSize];
  alignas(64) uint8_t wanted[kTileSize];
  ious_of_tile(work.predicted[tile_index], object, work.area[slot], iou);
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    of_iou[i] = iou_cost(iou[i], epsilon, iou_weight);
    of_place[i] = place_cost({tile.x[i], tile.y[i]}, tile.width[i], object, kRule, center_radius, penalty);
  }
  uint8_t any = 0;
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    // No class cost is below 0, and rounding keeps order.
    wanted[i] = (cost_order(of_iou[i] + of_place[i]) >= floor) & (tile.sum[i] >= 0.0f);
    any |= wanted[i];
  }
  if (any == 0) {
    return;
  }
  const int64_t first = tile_index * kTileSize;
  load_scores(work, slot, first, wanted, score);
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    const float of_class = class_cost(tile.sum[i], score[i], iou[i], kIsProbability, kRule == DynamicKRule::kSoftLabel);
    order[i] = cost_order((of_class * cls_weight + of_iou[i]) + of_place[i]);
  }
  for_marked<kTileSize>(wanted, [&](int64_t i) { best.add(claim_key(order[i], static_cast<uint32_t>(first + i))); });
}

template <DynamicKRule kRule, bool kIsProbability>
static void select_of_slot(const DynamicKWork& work, int32_t slot, BestKeys& best) {
  const DynamicKProblem& problem = problem_of(work);
  const Box object = object_of(work, slot);
  for (int64_t tile = 0; tile < work.num_tiles; ++tile) {
    if (work.candidates[tile].count > 0 &&
        can_be_cheap(work.candidates[tile].bounds, object, kRule, problem.center_radius)) {
      select_of_tile<kRule, kIsProbability>(work, slot, tile, best);
    }
  }
  // The others, as long as the cheapest so far are dearer than what these may cost.
  best.settle();
  const uint32_t without_iou = order_without_iou(problem, false);
  for (int64_t tile = 0; tile < work.num_tiles; ++tile) {
    if (work.candidates[tile].count == 0 ||
        can_be_cheap(work.candidates[tile].bounds, object, kRule, problem.center_radius)) {
      continue;
    }
    const bool overlaps = overlap(work.predicted[tile].bounds, object);
    if (overlaps || without_iou >= key_order(best.floor())) {
      select_of_tile<kRule, kIsProbability>(work, slot, tile, best);
    }
  }
}

template <DynamicKRule kRule>
static void select_cheapest(ImageWork& image_work, int64_t slot_begin, int64_t slot_end) {
  DynamicKWork& work = dynamic_k(image_work);
  const DefaultFloatEnvironment environment;
  const DynamicKProblem& problem = problem_of(work);
  for (int64_t slot = slot_begin; slot < slot_end; ++slot) {
    uint64_t* keys = work.selected + slot * problem.k;
    work.num_selected[slot] = 0;
    if (work.num_candidates == 0) {
      continue;
    }
    BestKeys best(count_selected(work, static_cast<int32_t>(slot), keys));
    if (problem.scores_are_probabilities) {
      select_of_slot<kRule, true>(work, static_cast<int32_t>(slot), best);
    } else {
      select_of_slot<kRule, false>(work, static_cast<int32_t>(slot), best);
    }
    work.num_selected[slot] = best.take(keys);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The anchors that several slots want

struct Candidate {
  Point point;
  Box box;  // the predicted one
  float width, sum, area;
};

static Candidate candidate_of(const DynamicKWork& work, uint32_t anchor) {
  const CandidateTile& tile = work.candidates[anchor / kTileSize];
  const BoxTile& predicted = work.predicted[anchor / kTileSize];
  const int64_t i = anchor % kTileSize;
  return {{tile.x[i], tile.y[i]},
          {predicted.x1[i], predicted.y1[i], predicted.x2[i], predicted.y2[i]},
          tile.width[i],
          tile.sum[i],
          predicted.area[i]};
}

static float score_of(const ImageWork& work, uint32_t anchor, int64_t slot) {
  const FloatInput& scores = work.problem->cls_scores;
  return work.label[slot] < 0 ? kNoScore
                              : load_float(scores, work.image * scores.image_stride + anchor * scores.row_stride +
                                                       work.label[slot] * scores.column_stride);
}

// The slot, of all, that an anchor costs least; `key` is claim_key(cost_order, slot) of one of them.
template <DynamicKRule kRule>
static int32_t cheapest_slot(const DynamicKWork& work, uint32_t anchor, const Candidate& candidate, uint64_t key) {
  const DynamicKProblem& problem = problem_of(work);
  const float epsilon = problem.epsilon, penalty = problem.penalty, center_radius = problem.center_radius;
  const float iou_weight = problem.iou_weight;
  const uint32_t without_iou = order_without_iou(problem, true);
  alignas(64) float iou[kSlotBlock], of_iou[kSlotBlock], of_place[kSlotBlock];
  alignas(64) uint32_t order[kSlotBlock];
  for (int32_t begin = 0; begin < work.num_slots; begin += kSlotBlock) {
    uint32_t any = 0;
    for (int32_t i = 0; i < kSlotBlock; ++i) {  // vector loop
      iou[i] = box_iou(candidate.box, candidate.area, object_of(work, begin + i), work.area[begin + i]);
      any |= float_bits(iou[i]);
    }
    if (any == 0 && without_iou < key_order(key)) {
      continue;
    }
    for (int32_t i = 0; i < kSlotBlock; ++i) {  // vector loop
      of_iou[i] = iou_cost(iou[i], epsilon, iou_weight);
      of_place[i] =
          place_cost(candidate.point, candidate.width, object_of(work, begin + i), kRule, center_radius, penalty);
      order[i] = cost_order(of_iou[i] + of_place[i]);
    }
    const int32_t count = std::min(kSlotBlock, work.num_slots - begin);
    for (int32_t i = 0; i < count; ++i) {
      if (order[i] < key_order(key)) {
        continue;
      }
      const float of_class = class_cost(candidate.sum, score_of(work, anchor, begin + i), iou[i],
                                        problem.scores_are_probabilities, kRule == DynamicKRule::kSoftLabel);
      const float cost = (of_class * problem.cls_weight + of_iou[i]) + of_place[i];
      key = std::max(key, claim_key(cost_order(cost), static_cast<uint32_t>(begin + i)));
    }
  }
  return static_cast<int32_t>(key_index(key));
}

// Calls visit(slot, anchor, key) for all that is selected, slots ascending.
template <class Visit>
static void for_choices(const DynamicKWork& work, Visit visit) {
  const int64_t k = problem_of(work).k;
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    const uint64_t* keys = work.selected + slot * k;
    for (int32_t i = 0; i < work.num_selected[slot]; ++i) {
      visit(slot, key_index(keys[i]), keys[i]);
    }
  }
}

template <DynamicKRule kRule>
static bool label_positives(ImageWork& image_work) {
  DynamicKWork& work = dynamic_k(image_work);
  const DefaultFloatEnvironment environment;
  const DynamicKProblem& problem = problem_of(work);
  int64_t* row = problem.cls_match + work.image * problem.num_anchors;
  float* targets = problem.soft_targets + work.image * problem.num_anchors;
  int32_t* num_pos = problem.num_pos + load_integer(problem.gt_offsets, work.image);
  for_choices(work, [&](int32_t slot, uint32_t anchor, uint64_t) {
    row[anchor] = row[anchor] == kBackground ? wanted_by(slot) : kWantedBySeveral;
  });
  for_choices(work, [&](int32_t slot, uint32_t anchor, uint64_t key) {
    if (row[anchor] >= 0) {
      return;  // it has its label
    }
    const Candidate candidate = candidate_of(work, anchor);
    if (row[anchor] == kWantedBySeveral) {
      slot = cheapest_slot<kRule>(work, anchor, candidate, claim_key(key_order(key), static_cast<uint32_t>(slot)));
    }
    row[anchor] = work.object[slot];
    targets[anchor] = box_iou(candidate.box, candidate.area, object_of(work, slot), work.area[slot]);
    ++num_pos[work.object[slot]];
  });
  return true;
}

static void label_crowds(ImageWork& work, int64_t tile_begin, int64_t tile_end) {
  const DefaultFloatEnvironment environment;
  ignore_crowds(work, problem_of(work).crowd_overlap, tile_begin, tile_end);
}

template <DynamicKRule kRule>
static RuleKernels kernels_of() {
  return {load_anchor_tiles,
          create_dynamic_k,
          destroy_dynamic_k,
          begin_dynamic_k,
          count_slots,
          {{find_candidates<kRule>},
           {nullptr, nullptr, select_cheapest<kRule>},
           {nullptr, label_positives<kRule>},
           {label_crowds}}};
}

}  // namespace

RuleKernels simota_box_or_center_kernels() { return kernels_of<DynamicKRule::kBoxOrCenter>(); }
RuleKernels simota_center_kernels() { return kernels_of<DynamicKRule::kCenter>(); }
RuleKernels dynamic_soft_label_kernels() { return kernels_of<DynamicKRule::kSoftLabel>(); }

}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
