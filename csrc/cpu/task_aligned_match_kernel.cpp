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

// The centers of the anchors of a tile.
struct alignas(64) PointTile {
  float x[kTileSize], y[kTileSize];
};

// An anchor that several slots selected, and the one that gets it.
struct Contested {
  uint64_t key;  // its claim_key by the metric
  int32_t slot;
  float overlap;
};

// An image's scratch. Until the labels are written, the image's row of cls_match holds the owners of the anchors.
struct TaskAlignedWork : RankedWork {
  // In rule_block, per tile: 30 bytes an anchor.
  BoxTile* predicted;
  PointTile* points;
  BoundingBoxes predicted_bounds;
  BoundingBoxes point_bounds;  // around those of its points that are anywhere

  // Per slot, of the anchors that are its own in the end.
  Block largest_block;
  float *largest_metric, *largest_overlap;

  Contested* contested;  // in key_block; with k_after_conflict by slot, the best first
  int64_t num_contested;
};

namespace MG_OPS_CPU_TARGET {
namespace {

// Owners that are no slot.
constexpr int64_t kNobody = kBackground;
constexpr int64_t kSeveral = -2;  // several slots want the anchor, and others may have it too
constexpr int64_t kListed = -3;   // the same, and it is among the contested ones

static const TaskAlignedProblem& problem_of(const ImageWork& work) {
  return *static_cast<const TaskAlignedProblem*>(work.problem);
}

MG_OPS_INLINE TaskAlignedWork& task_aligned(ImageWork& work) { return static_cast<TaskAlignedWork&>(work); }

MG_OPS_INLINE int64_t* owners_of(const TaskAlignedWork& work) {
  return work.problem->cls_match + work.image * work.problem->num_anchors;
}

// ---------------------------------------------------------------------------------------------------------------------
// Anchors and their predicted boxes

constexpr int64_t kTileBlock = 16;

// Returns how many bytes the arrays of the tiles need.
static size_t place_tiles(TaskAlignedWork& work, char* memory) {
  Placing placing{memory};
  const int64_t padded = (work.num_tiles + kTileBlock - 1) / kTileBlock * kTileBlock;
  placing.place(work.predicted, work.num_tiles);
  placing.place(work.points, work.num_tiles);
  for (BoundingBoxes* bounds : {&work.predicted_bounds, &work.point_bounds}) {
    place_boxes(placing, *bounds, padded);
    for (int64_t tile = work.num_tiles; memory != nullptr && tile < padded; ++tile) {
      bounds->set(tile, kNoBounds);
    }
  }
  return placing.bytes;
}

static void destroy_task_aligned(ImageWork* work) {
  if (work != nullptr) {
    std::free(task_aligned(*work).largest_block.memory);
  }
  destroy_ranked(work);
}

static ImageWork* create_task_aligned(const MatchProblem& problem, const BoxTile* anchor_tiles) {
  TaskAlignedWork* work = new_work<TaskAlignedWork>(problem, anchor_tiles);
  if (work == nullptr) {
    return nullptr;
  }
  if (!reserve(work->rule_block, place_tiles(*work, nullptr))) {
    destroy_task_aligned(work);
    return nullptr;
  }
  place_tiles(*work, work->rule_block.memory);
  return work;
}

// Reads the centers of the anchors of a tile; behind the last one there is nothing anywhere.
static void load_points(const ImageWork& work, int64_t tile_index, PointTile& points) {
  const MatchProblem& problem = *work.problem;
  const int64_t count = tile_count(problem, tile_index);
  alignas(64) float x1[kTileSize], y1[kTileSize], x2[kTileSize], y2[kTileSize];
  load_columns(problem.anchors, 0, tile_index * kTileSize, count, x1, y1, x2, y2);
  for (int64_t i = count; i < kTileSize; ++i) {
    x1[i] = y1[i] = x2[i] = y2[i] = kMaxFloat;
  }
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    const Point point = box_center({x1[i], y1[i], x2[i], y2[i]});
    points.x[i] = point.x;
    points.y[i] = point.y;
  }
}

static Box bounds_of(const PointTile& points) {
  Box bounds = kNoBounds;
  for (int64_t i = 0; i < kTileSize; ++i) {
    const Point point = {points.x[i], points.y[i]};
    const bool somewhere = point.x != kNowhere.x || point.y != kNowhere.y;
    bounds.x1 = somewhere ? min_float(bounds.x1, point.x) : bounds.x1;
    bounds.y1 = somewhere ? min_float(bounds.y1, point.y) : bounds.y1;
    bounds.x2 = somewhere ? max_float(bounds.x2, point.x) : bounds.x2;
    bounds.y2 = somewhere ? max_float(bounds.y2, point.y) : bounds.y2;
  }
  return bounds;
}

// Which points of a tile are inside of a box by more than a margin. Whether any is.
MG_OPS_INLINE bool find_inside(const PointTile& points, const Box& gate, float margin, uint8_t* inside) {
  uint8_t any = 0;
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    inside[i] = is_inside({points.x[i], points.y[i]}, gate, margin);
    any |= inside[i];
  }
  return any != 0;
}

static bool begin_task_aligned(ImageWork& image_work, int64_t image) {
  TaskAlignedWork& work = task_aligned(image_work);
  const TaskAlignedProblem& problem = problem_of(work);
  std::memset(problem.soft_targets + image * problem.num_anchors, 0,
              static_cast<size_t>(problem.num_anchors) * sizeof(float));
  work.num_contested = 0;
  if (!begin_ranked(work, image, std::max(problem.k, problem.k_after_conflict))) {
    return false;
  }
  const size_t bytes = static_cast<size_t>(work.num_slots) * sizeof(float);
  if (!reserve(work.largest_block, 2 * bytes)) {
    return false;
  }
  std::memset(work.largest_block.memory, 0, 2 * bytes);
  work.largest_metric = reinterpret_cast<float*>(work.largest_block.memory);
  work.largest_overlap = work.largest_metric + work.num_slots;
  return true;
}

static void load_tiles(ImageWork& image_work, int64_t tile_begin, int64_t tile_end) {
  if (image_work.num_slots == 0) {
    return;
  }
  const DefaultFloatEnvironment environment;
  TaskAlignedWork& work = task_aligned(image_work);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    load_points(work, tile, work.points[tile]);
    work.point_bounds.set(tile, bounds_of(work.points[tile]));
    load_regressed_tile(work, tile, work.predicted[tile]);
    work.predicted_bounds.set(tile, work.predicted[tile].bounds);
  }
}

MG_OPS_INLINE Point anchor_point(const TaskAlignedWork& work, uint32_t anchor) {
  const PointTile& tile = work.points[anchor / kTileSize];
  return {tile.x[anchor % kTileSize], tile.y[anchor % kTileSize]};
}

MG_OPS_INLINE Box predicted_box(const TaskAlignedWork& work, uint32_t anchor, float& area) {
  const BoxTile& tile = work.predicted[anchor / kTileSize];
  const int64_t i = anchor % kTileSize;
  area = tile.area[i];
  return {tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]};
}

// The box that the center of an anchor must be inside of to be selected.
MG_OPS_INLINE Box gate_of(const ImageWork& work, int64_t slot) {
  return gate_box(object_of(work, slot), problem_of(work).minimum_side);
}

// Calls visit(tile), in ascending order, for the tiles whose bounds overlap the box, and whose other bounds the other.
template <class Visit>
MG_OPS_INLINE void for_tiles_near(const ImageWork& work, const BoundingBoxes& bounds, const Box& box,
                                  const BoundingBoxes& other_bounds, const Box& other_box, Visit visit) {
  for (int64_t begin = 0; begin < work.num_tiles; begin += kTileBlock) {
    alignas(16) uint8_t near[kTileBlock];
    for (int64_t i = 0; i < kTileBlock; ++i) {  // vector loop
      near[i] = overlap(bounds.get(begin + i), box) & overlap(other_bounds.get(begin + i), other_box);
    }
    for_marked<kTileBlock>(near, [&](int64_t i) { visit(begin + i); });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The best anchors of a slot

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
static void add_hopeful(const TaskAlignedWork& work, int32_t slot, Hopeful& hopeful, BestKeys& best) {
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
static void evaluate(const TaskAlignedWork& work, int32_t slot, float object_angle, Gathered& gathered,
                     Hopeful& hopeful, BestKeys& best) {
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

static void select_of_slot(const TaskAlignedWork& work, int32_t slot, float object_angle, Gathered& gathered,
                           BestKeys& best) {
  Hopeful hopeful;
  const TaskAlignedProblem& problem = problem_of(work);
  const Box object = object_of(work, slot), gate = gate_of(work, slot);
  const float slack = problem.beta.halves >= 0 ? 1.0f : 1.00001f;
  const BoundingBoxes& inside_bounds = problem.inside_first ? work.point_bounds : work.predicted_bounds;
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
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Which slot an anchor belongs to

static float overlap_of(const TaskAlignedWork& work, uint32_t anchor, int64_t slot) {
  float area;
  const Box box = predicted_box(work, anchor, area);
  return pair_overlap(problem_of(work), box, area, object_of(work, slot), work.area[slot]);
}

// The owners of the contested anchors, among all objects or those that they are inside of: the one of the largest
// overlap, the lower slot on a tie.
static void find_owners(TaskAlignedWork& work, const NearbySlots& nearby) {
  const TaskAlignedProblem& problem = problem_of(work);
  for (int64_t i = 0; i < work.num_contested; ++i) {
    Contested& contested = work.contested[i];
    const uint32_t anchor = key_index(contested.key);
    contested.overlap = -1.0f;
    float area;
    const Box box = predicted_box(work, anchor, area);
    const auto compete = [&](int32_t slot) {
      const Box object = object_of(work, slot);
      float overlap = box_iou(box, area, object, work.area[slot]);
      if (problem.by_ciou && overlap > 0.0f && overlap >= contested.overlap) {  // which CIoU cannot be above
        overlap = positive_ciou(box, object, box_angle(object), overlap);
      }
      if (overlap > contested.overlap || (overlap == contested.overlap && slot < contested.slot)) {
        contested.overlap = overlap;
        contested.slot = slot;
      }
    };
    if (problem.conflict == Conflict::kInside) {
      const Point point = anchor_point(work, anchor);
      const float margin = problem.center_margin;
      for_nearby(nearby, [&](const Box& gate) { return is_inside(point, gate, margin); }, compete);
    } else {
      for_nearby(nearby, [&](const Box& object) { return overlap(object, box); }, compete);
    }
    const float p = probability_of(work, anchor, contested.slot);
    const float metric = pair_metric(problem, p, contested.overlap, power(contested.overlap, problem.beta));
    contested.key = claim_key(iou_order(metric), anchor);
  }
}

// Writes the owner of each selected anchor, or that it is contested: then it is listed with its owner.
static bool resolve_conflicts(ImageWork& image_work) {
  const DefaultFloatEnvironment environment;
  TaskAlignedWork& work = task_aligned(image_work);
  const TaskAlignedProblem& problem = problem_of(work);
  int64_t* owners = owners_of(work);
  int64_t num_contested = 0;
  for_selected(work, [&](int32_t slot, uint32_t anchor, int64_t) {
    int64_t& owner = owners[anchor];
    if (owner == kNobody) {
      owner = slot;
    } else if (problem.conflict == Conflict::kSelecting) {  // slots ascend: a tie stays with the lower one
      owner = overlap_of(work, anchor, slot) > overlap_of(work, anchor, owner) ? slot : owner;
    } else if (owner != kSeveral) {
      owner = kSeveral;
      ++num_contested;
    }
  });
  if (num_contested == 0) {
    return true;
  }
  NearbySlots nearby;
  Placing placing{nullptr};
  placing.place(work.contested, num_contested);
  if (!reserve(work.key_block, placing.bytes + place_nearby(nearby, work.num_slots, nullptr))) {
    return false;
  }
  work.contested = reinterpret_cast<Contested*>(work.key_block.memory);
  for_selected(work, [&](int32_t, uint32_t anchor, int64_t) {
    if (owners[anchor] == kSeveral) {
      owners[anchor] = kListed;
      work.contested[work.num_contested++].key = claim_key(0, anchor);
    }
  });
  place_nearby(nearby, work.num_slots, work.key_block.memory + placing.bytes);
  load_nearby(nearby, work.num_slots, [&](int32_t slot) {
    return problem.conflict == Conflict::kInside ? gate_of(work, slot) : object_of(work, slot);
  });
  find_owners(work, nearby);
  return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Labels

// The largest overlap of a slot with the anchors of its list.
static float find_largest_overlap(const TaskAlignedWork& work, int32_t slot, Gathered& gathered) {
  const Box object = object_of(work, slot);
  const float object_angle = box_angle(object);
  const int64_t begin = slot * work.list_stride, end = begin + work.num_selected[slot];
  alignas(64) float overlap_with[kTileSize];
  float largest = 0.0f;
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
    for (int64_t i = 0; i < gathered.size; ++i) {
      largest = max_float(largest, overlap_with[i]);
    }
  }
  return largest;
}

// Leaves in each slot's list the anchors that it owns.
static void drop_lost(ImageWork& image_work, int64_t slot_begin, int64_t slot_end) {
  const DefaultFloatEnvironment environment;
  TaskAlignedWork& work = task_aligned(image_work);
  const int64_t* owners = owners_of(work);
  Gathered gathered;
  for (int32_t slot = static_cast<int32_t>(slot_begin); slot < slot_end; ++slot) {
    uint64_t* list = work.selected + slot * work.list_stride;
    const uint64_t* end = std::remove_if(list, list + work.num_selected[slot],
                                         [&](uint64_t key) { return owners[key_index(key)] != slot; });
    work.num_selected[slot] = static_cast<int32_t>(end - list);
    if (problem_of(work).k_after_conflict == 0 && end > list) {
      work.largest_metric[slot] = bits_float(key_order(*std::max_element(list, list + work.num_selected[slot])));
      work.largest_overlap[slot] = find_largest_overlap(work, slot, gathered);
    }
  }
}

// Leaves each slot the k_after_conflict best of its anchors, the contested ones included, all of them in its list, and
// the others to nobody.
static void keep_best(TaskAlignedWork& work) {
  const TaskAlignedProblem& problem = problem_of(work);
  int64_t* owners = owners_of(work);
  std::sort(work.contested, work.contested + work.num_contested,
            [](const Contested& a, const Contested& b) { return a.slot != b.slot ? a.slot < b.slot : a.key > b.key; });
  const Contested *next = work.contested, *end = work.contested + work.num_contested;
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    uint64_t keys[2 * kMaxK];
    uint64_t* list = work.selected + slot * work.list_stride;
    int32_t count = work.num_selected[slot];
    std::memcpy(keys, list, static_cast<size_t>(count) * sizeof *keys);
    for (int32_t i = 0; next < end && next->slot == slot; ++i, ++next) {
      owners[key_index(next->key)] = kNobody;
      if (i < problem.k_after_conflict) {
        keys[count++] = next->key;
      }
    }
    std::sort(keys, keys + count, [](uint64_t a, uint64_t b) { return a > b; });
    int32_t kept = 0;
    for (int32_t i = 0; i < count; ++i) {
      const uint32_t anchor = key_index(keys[i]);
      owners[anchor] = kNobody;
      if (i < problem.k_after_conflict && key_order(keys[i]) > 0) {
        list[kept++] = keys[i];
        work.largest_metric[slot] = max_float(work.largest_metric[slot], bits_float(key_order(keys[i])));
        work.largest_overlap[slot] = max_float(work.largest_overlap[slot], overlap_of(work, anchor, slot));
      }
    }
    work.num_selected[slot] = kept;
  }
  work.num_contested = 0;
}

// Writes the labels in the place of the owners.
static bool label_positives(ImageWork& image_work) {
  const DefaultFloatEnvironment environment;
  TaskAlignedWork& work = task_aligned(image_work);
  const TaskAlignedProblem& problem = problem_of(work);
  if (problem.k_after_conflict > 0) {
    keep_best(work);
  }
  const int64_t first = work.image * problem.num_anchors;
  int32_t* num_pos = problem.num_pos + load_integer(problem.gt_offsets, work.image);
  const auto label = [&](int32_t slot, uint64_t key) {
    const int32_t object = work.object[slot];
    const int64_t anchor = first + key_index(key);
    problem.cls_match[anchor] = object;
    problem.soft_targets[anchor] =
        soft_target(problem, bits_float(key_order(key)), work.largest_metric[slot], work.largest_overlap[slot]);
    ++num_pos[object];
  };
  for (int64_t i = 0; i < work.num_contested; ++i) {
    const Contested& contested = work.contested[i];
    float &metric = work.largest_metric[contested.slot], &overlap = work.largest_overlap[contested.slot];
    metric = max_float(metric, bits_float(key_order(contested.key)));
    overlap = max_float(overlap, contested.overlap);
  }
  for (int64_t i = 0; i < work.num_contested; ++i) {
    label(work.contested[i].slot, work.contested[i].key);
  }
  for_selected(work, [&](int32_t slot, uint32_t, int64_t place) { label(slot, work.selected[place]); });
  return true;
}

static void label_crowds(ImageWork& work, int64_t tile_begin, int64_t tile_end) {
  const DefaultFloatEnvironment environment;
  ignore_crowds(work, problem_of(work).crowd_overlap, tile_begin, tile_end);
}

}  // namespace

RuleKernels task_aligned_kernels() {
  return {load_anchor_tiles,
          create_task_aligned,
          destroy_task_aligned,
          begin_task_aligned,
          count_slots,
          {{load_tiles},
           {nullptr, nullptr, select_by_metric},
           {nullptr, resolve_conflicts},
           {nullptr, nullptr, drop_lost},
           {nullptr, label_positives},
           {label_crowds}}};
}

}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
