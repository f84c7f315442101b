// Task-aligned matching of one image on the CPU: each slot looks at the tiles with anchors inside it, then the anchors
// that several slots have selected find their owner.
//
// A pair is left out where its overlap alone shows that it cannot be among the slot's k best: p**alpha is at most 1,
// and CIoU at most IoU, so t <= IoU**beta. Of a tile that is known before its IoUs are (largest_possible_iou).
#ifndef MG_OPS_CPU_TARGET
#define MG_OPS_CPU_TARGET baseline
#endif

#pragma GCC diagnostic ignored "-Wunused-function"  // of the shared parts this rule uses a few

#include "../task_aligned.h"
#include "nearby_slots.h"

namespace mg_ops {

struct TaskAlignedWork : RankedWork {
  Block overlap_block;
  float* selected_overlap;  // of each place in `selected`: the overlap of the anchor with the slot
};

namespace MG_OPS_CPU_TARGET {
namespace {

// An anchor and the slot that it belongs to.
struct Positive {
  uint32_t anchor;
  int32_t slot;
  float metric, overlap;
};

static const TaskAlignedProblem& problem_of(const ImageWork& work) {
  return *static_cast<const TaskAlignedProblem*>(work.problem);
}

MG_OPS_INLINE TaskAlignedWork& task_aligned(ImageWork& work) { return static_cast<TaskAlignedWork&>(work); }

static void destroy_task_aligned(ImageWork* work) {
  if (work != nullptr) {
    std::free(task_aligned(*work).overlap_block.memory);
  }
  destroy_ranked(work);
}

static bool begin_task_aligned(ImageWork& work, int64_t image) {
  const TaskAlignedProblem& problem = problem_of(work);
  std::memset(problem.soft_targets + image * problem.num_anchors, 0,
              static_cast<size_t>(problem.num_anchors) * sizeof(float));
  TaskAlignedWork& ranking = task_aligned(work);
  if (!begin_ranked(ranking, image, problem.k) ||
      !reserve(ranking.overlap_block, static_cast<size_t>(work.num_slots * ranking.list_stride) * sizeof(float))) {
    return false;
  }
  ranking.selected_overlap = reinterpret_cast<float*>(ranking.overlap_block.memory);
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    const Box gate = gate_box(object_of(work, slot), problem.minimum_side);
    ranking.gate_x1[slot] = gate.x1;
    ranking.gate_y1[slot] = gate.y1;
    ranking.gate_x2[slot] = gate.x2;
    ranking.gate_y2[slot] = gate.y2;
  }
  return true;
}

static void load_tiles(ImageWork& work, int64_t tile_begin, int64_t tile_end) {
  if (work.num_slots == 0) {
    return;
  }
  const DefaultFloatEnvironment environment;
  RankedWork& ranking = ranked(work);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    load_points(ranking, tile);
    load_predicted(ranking, tile);
  }
  std::memset(ranking.selecting_owner + tile_begin * kTileSize, 0xff,
              static_cast<size_t>((tile_end - tile_begin) * kTileSize) * sizeof(int32_t));
}

// `power` of 64 numbers: the same products, of vectors.
static void power_of_tile(const float* x, Exponent exponent, float* result) {
  if (exponent.halves < 0) {
    for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
      result[i] = power_by_logarithm(x[i], exponent.value);
    }
    return;
  }
  alignas(64) float square[kTileSize];
  std::memcpy(square, x, sizeof square);
  for (int64_t i = 0; i < kTileSize; ++i) {
    result[i] = 1.0f;
  }
  for (int32_t whole = exponent.halves / 2; whole > 0; whole /= 2) {
    const bool multiply = whole % 2 == 1;
    for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
      result[i] = multiply ? result[i] * square[i] : result[i];
      square[i] = square[i] * square[i];
    }
  }
  if (exponent.halves % 2 == 1) {
    for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
      result[i] = result[i] * square_root(x[i]);
    }
  }
}

// Candidates of a slot, gathered over tiles, most of which have a few: the arithmetic then runs on whole vectors.
struct Gathered {
  int64_t size = 0;
  alignas(64) float x1[kTileSize], y1[kTileSize], x2[kTileSize], y2[kTileSize], area[kTileSize];
  uint32_t anchor[kTileSize];

  void add(const Box& box, float box_area, uint32_t number) {
    x1[size] = box.x1;
    y1[size] = box.y1;
    x2[size] = box.x2;
    y2[size] = box.y2;
    area[size] = box_area;
    anchor[size++] = number;
  }
};

// The IoU of each with an object; 0 behind the last one.
static void find_iou(Gathered& gathered, const Box& object, float area, float* iou) {
  for (int64_t i = gathered.size; i < kTileSize; ++i) {  // overlaps nothing
    gathered.x1[i] = gathered.y1[i] = gathered.x2[i] = gathered.y2[i] = gathered.area[i] = 0.0f;
  }
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    iou[i] = box_iou({gathered.x1[i], gathered.y1[i], gathered.x2[i], gathered.y2[i]}, gathered.area[i], object, area);
  }
}

// Their CIoU in the place of their IoU.
static void find_ciou(const Gathered& gathered, const Box& object, float object_angle, float* overlap_with) {
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    const float iou = overlap_with[i];
    const Box box = {gathered.x1[i], gathered.y1[i], gathered.x2[i], gathered.y2[i]};
    const float ciou = positive_ciou(box, object, object_angle, iou);
    overlap_with[i] = iou > 0.0f ? ciou : 0.0f;
  }
}

// Those of them whose overlap may be enough. Their scores are on the way: each is in a cache line of its own, and
// several that were asked for arrive together.
struct Hopeful {
  static constexpr int64_t kEnough = 16;

  int64_t size = 0;
  uint32_t anchor[kEnough + kTileSize];
  float overlap_with[kEnough + kTileSize], possible[kEnough + kTileSize];  // the overlap, and overlap**beta
};

// Shows them, which ascend, to the slot's best ones.
static void add_hopeful(const RankedWork& work, int32_t slot, Hopeful& hopeful, BestKeys& best) {
  for (int64_t i = 0; i < hopeful.size; ++i) {
    if (iou_order(hopeful.possible[i]) <= key_order(best.floor())) {
      continue;
    }
    const float p = probability_of(work, hopeful.anchor[i], slot);
    const float metric = pair_metric(problem_of(work), p, hopeful.overlap_with[i], hopeful.possible[i]);
    if (metric > 0.0f) {
      best.add(claim_key(iou_order(metric), hopeful.anchor[i]));
    }
  }
  hopeful.size = 0;
}

// Finds the hopeful ones among those that are gathered.
static void evaluate(const RankedWork& work, int32_t slot, float object_angle, Gathered& gathered, Hopeful& hopeful,
                     BestKeys& best) {
  const TaskAlignedProblem& problem = problem_of(work);
  const Box object = object_of(work, slot);
  // Where x**beta is no product, it may be a little smaller for a larger x.
  const float slack = problem.beta.halves >= 0 ? 1.0f : 1.00001f;
  alignas(64) uint8_t wanted[kTileSize];
  alignas(64) float overlap_with[kTileSize], possible[kTileSize];  // overlap, and overlap**beta
  // Marks the anchors whose overlap may be enough. Whether any is.
  const auto mark_hopeful = [&] {
    power_of_tile(overlap_with, problem.beta, possible);
    const uint32_t floor = key_order(best.floor());
    uint8_t any = 0;
    for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
      wanted[i] = (overlap_with[i] > 0.0f) & (iou_order(slack * possible[i]) > floor);
      any |= wanted[i];
    }
    return any != 0;
  };
  find_iou(gathered, object, work.area[slot], overlap_with);
  bool any = mark_hopeful();
  if (any && problem.by_ciou) {
    find_ciou(gathered, object, object_angle, overlap_with);
    any = mark_hopeful();
  }
  gathered.size = 0;
  if (!any) {
    return;
  }
  for_marked<kTileSize>(wanted, [&](int64_t i) {
    prefetch_score(work, gathered.anchor[i], slot);
    const int64_t place = hopeful.size++;
    hopeful.anchor[place] = gathered.anchor[i];
    hopeful.overlap_with[place] = overlap_with[i];
    hopeful.possible[place] = possible[i];
  });
  if (hopeful.size >= Hopeful::kEnough) {
    add_hopeful(work, slot, hopeful, best);
  }
}

static void select_of_slot(const RankedWork& work, int32_t slot, float object_angle, Gathered& gathered,
                           BestKeys& best) {
  Hopeful hopeful;
  const TaskAlignedProblem& problem = problem_of(work);
  const Box object = object_of(work, slot), gate = gate_of(work, slot);
  const float slack = problem.beta.halves >= 0 ? 1.0f : 1.00001f;
  const TileBoxes& inside_bounds = problem.inside_first ? work.points_bounds : work.predicted_bounds;
  const Box& inside_of = problem.inside_first ? gate : object;
  for_tiles_near(work, work.predicted_bounds, object, inside_bounds, inside_of, [&](int64_t tile_index) {
    const BoxTile& tile = work.predicted[tile_index];
    const float largest = slack * power(largest_possible_iou(tile, work, slot), problem.beta);
    if (iou_order(largest) <= key_order(best.floor())) {
      return;
    }
    alignas(64) uint8_t wanted[kTileSize];
    if (!problem.inside_first) {
      std::memset(wanted, 1, sizeof wanted);
    } else if (!find_inside(work.points[tile_index], gate, problem.center_margin, wanted)) {
      return;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < kTileSize; ++i) {
      count += wanted[i];
    }
    if (gathered.size + count > kTileSize) {
      evaluate(work, slot, object_angle, gathered, hopeful, best);
    }
    if (count == kTileSize) {
      std::memcpy(gathered.x1, tile.x1, sizeof tile.x1);
      std::memcpy(gathered.y1, tile.y1, sizeof tile.y1);
      std::memcpy(gathered.x2, tile.x2, sizeof tile.x2);
      std::memcpy(gathered.y2, tile.y2, sizeof tile.y2);
      std::memcpy(gathered.area, tile.area, sizeof tile.area);
      for (int64_t i = 0; i < kTileSize; ++i) {
        gathered.anchor[i] = static_cast<uint32_t>(tile_index * kTileSize + i);
      }
      gathered.size = kTileSize;
      return;
    }
    for_marked<kTileSize>(wanted, [&](int64_t i) {
      gathered.add({tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]}, tile.area[i],
                   static_cast<uint32_t>(tile_index * kTileSize + i));
    });
  });
  if (gathered.size > 0) {
    evaluate(work, slot, object_angle, gathered, hopeful, best);
  }
  add_hopeful(work, slot, hopeful, best);
}

// Writes the overlaps of the anchors that a slot has selected.
static void find_overlaps(TaskAlignedWork& work, int32_t slot, float object_angle, Gathered& gathered) {
  const Box object = object_of(work, slot);
  const int64_t begin = slot * work.list_stride, end = begin + work.num_selected[slot];
  alignas(64) float overlap_with[kTileSize];
  for (int64_t first = begin; first < end; first += kTileSize) {
    gathered.size = 0;
    for (int64_t place = first; place < std::min(end, first + kTileSize); ++place) {
      float area;
      const Box box = predicted_box(work, key_index(work.selected[place]), area);
      gathered.add(box, area, 0);
    }
    find_iou(gathered, object, work.area[slot], overlap_with);
    if (problem_of(work).by_ciou) {
      find_ciou(gathered, object, object_angle, overlap_with);
    }
    std::memcpy(work.selected_overlap + first, overlap_with, static_cast<size_t>(gathered.size) * sizeof(float));
  }
  gathered.size = 0;
}

static void select_by_metric(ImageWork& image_work, int64_t slot_begin, int64_t slot_end) {
  const DefaultFloatEnvironment environment;
  TaskAlignedWork& work = task_aligned(image_work);
  const TaskAlignedProblem& problem = problem_of(work);
  Gathered gathered;
  for (int32_t slot = static_cast<int32_t>(slot_begin); slot < slot_end; ++slot) {
    BestKeys best(problem.k);
    const float object_angle = box_angle(object_of(work, slot));
    select_of_slot(work, slot, object_angle, gathered, best);
    uint64_t* list = work.selected + slot * work.list_stride;
    int32_t size = best.take(list);
    if (!problem.inside_first) {
      const Box gate = gate_of(work, slot);
      const uint64_t* end = std::remove_if(list, list + size, [&](uint64_t key) {
        return !is_inside(anchor_point(work, key_index(key)), gate, problem.center_margin);
      });
      size = static_cast<int32_t>(end - list);
    }
    work.num_selected[slot] = size;
    find_overlaps(work, slot, object_angle, gathered);
  }
}

static float overlap_of(const RankedWork& work, uint32_t anchor, int32_t slot) {
  float area;
  const Box box = predicted_box(work, anchor, area);
  return pair_overlap(problem_of(work), box, area, object_of(work, slot), work.area[slot]);
}

// The contested anchors, among all objects or those that they are inside of: the one of the largest overlap, the lower
// slot on a tie.
static void find_owners(const TaskAlignedWork& work, const NearbySlots& nearby, Positive* positives, int64_t count) {
  const TaskAlignedProblem& problem = problem_of(work);
  for (int64_t i = 0; i < count; ++i) {
    Positive& positive = positives[i];
    positive.overlap = -1.0f;
    float area;
    const Box box = predicted_box(work, positive.anchor, area);
    const auto compete = [&](int32_t slot) {
      const Box object = object_of(work, slot);
      float overlap = box_iou(box, area, object, work.area[slot]);
      if (problem.by_ciou && overlap > 0.0f && overlap >= positive.overlap) {  // which CIoU cannot be above
        overlap = positive_ciou(box, object, box_angle(object), overlap);
      }
      if (overlap > positive.overlap || (overlap == positive.overlap && slot < positive.slot)) {
        positive.overlap = overlap;
        positive.slot = slot;
      }
    };
    if (problem.conflict == Conflict::kInside) {
      const Point point = anchor_point(work, positive.anchor);
      const float margin = problem.center_margin;
      for_nearby(nearby, [&](const Box& gate) { return is_inside(point, gate, margin); }, compete);
    } else {
      for_nearby(nearby, [&](const Box& object) { return overlap(object, box); }, compete);
    }
    positive.metric = pair_metric(problem, probability_of(work, positive.anchor, positive.slot), positive.overlap,
                                  power(positive.overlap, problem.beta));
  }
}

// Gives each selected anchor to one slot; returns how many there are, in the order of their slots but for those that
// were contested among all. `nearby_memory` is for the slots by their place.
static int64_t resolve_conflicts(TaskAlignedWork& work, Positive* positives, char* nearby_memory) {
  const TaskAlignedProblem& problem = problem_of(work);
  int64_t count = 0;
  for_selected(work, [&](int32_t slot, uint32_t anchor, int64_t place) {
    int32_t& owner = work.selecting_owner[anchor];
    if (owner == kNobody) {
      owner = slot;
    } else if (problem.conflict == Conflict::kSelecting) {  // slots ascend: a tie stays with the lower one
      owner = work.selected_overlap[place] > overlap_of(work, anchor, owner) ? slot : owner;
    } else if (owner != kContested) {
      owner = kContested;
      positives[count++].anchor = anchor;
    }
  });
  if (count > 0) {
    NearbySlots nearby;
    place_nearby(nearby, work.num_slots, nearby_memory);
    load_nearby(nearby, work.num_slots, [&](int32_t slot) {
      return problem.conflict == Conflict::kInside ? gate_of(work, slot) : object_of(work, slot);
    });
    find_owners(work, nearby, positives, count);
  }
  for_selected(work, [&](int32_t slot, uint32_t anchor, int64_t place) {
    if (work.selecting_owner[anchor] == slot) {
      const float metric = bits_float(key_order(work.selected[place]));
      positives[count++] = {anchor, slot, metric, work.selected_overlap[place]};
    }
  });
  return count;
}

// Leaves each slot the k_after_conflict best of its anchors; returns how many are left.
static int64_t keep_best(Positive* positives, int64_t count, int32_t k_after_conflict) {
  std::sort(positives, positives + count, [](const Positive& a, const Positive& b) {
    return a.slot != b.slot ? a.slot < b.slot : a.metric != b.metric ? a.metric > b.metric : a.anchor < b.anchor;
  });
  int64_t kept = 0;
  int32_t of_slot = 0, slot = kNobody;
  for (int64_t i = 0; i < count; ++i) {
    of_slot = positives[i].slot == slot ? of_slot + 1 : 0;
    slot = positives[i].slot;
    if (of_slot < k_after_conflict && positives[i].metric > 0.0f) {
      positives[kept++] = positives[i];
    }
  }
  return kept;
}

static bool label_positives(ImageWork& work) {
  const DefaultFloatEnvironment environment;
  const TaskAlignedProblem& problem = problem_of(work);
  TaskAlignedWork& ranking = task_aligned(work);
  int64_t num_selected = 0;
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    num_selected += ranking.num_selected[slot];
  }
  if (num_selected == 0) {
    return true;
  }
  Positive* positives;
  Placing placing{nullptr};
  placing.place(positives, num_selected);
  NearbySlots nearby;
  if (!reserve(work.key_block, placing.bytes + place_nearby(nearby, work.num_slots, nullptr))) {
    return false;
  }
  positives = reinterpret_cast<Positive*>(work.key_block.memory);
  int64_t count = resolve_conflicts(ranking, positives, work.key_block.memory + placing.bytes);
  if (problem.k_after_conflict > 0) {
    count = keep_best(positives, count, problem.k_after_conflict);
  }
  for (int64_t i = 0; i < count; ++i) {
    const Positive& positive = positives[i];
    float &metric = ranking.largest_metric[positive.slot], &overlap = ranking.largest_overlap[positive.slot];
    metric = max_float(metric, positive.metric);
    overlap = max_float(overlap, positive.overlap);
  }
  const int64_t first = work.image * problem.num_anchors;
  int32_t* num_pos = problem.num_pos + load_integer(problem.gt_offsets, work.image);
  for (int64_t i = 0; i < count; ++i) {
    const Positive& positive = positives[i];
    const int32_t object = work.object[positive.slot];
    problem.cls_match[first + positive.anchor] = object;
    problem.soft_targets[first + positive.anchor] = soft_target(
        problem, positive.metric, ranking.largest_metric[positive.slot], ranking.largest_overlap[positive.slot]);
    ++num_pos[object];
  }
  return true;
}

static void label_crowds(ImageWork& work, int64_t tile_begin, int64_t tile_end) {
  const DefaultFloatEnvironment environment;
  ignore_crowds(work, problem_of(work).crowd_overlap, tile_begin, tile_end);
}

}  // namespace

RuleKernels task_aligned_kernels() {
  return {load_anchor_tiles,
          create_ranked<true, TaskAlignedWork>,
          destroy_task_aligned,
          begin_task_aligned,
          count_slots,
          {{load_tiles}, {nullptr, nullptr, select_by_metric}, {nullptr, label_positives}, {label_crowds}}};
}

}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
