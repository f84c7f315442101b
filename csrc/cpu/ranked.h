// What the rules share in which each object selects its best anchors: the image's anchors as points, its predicted
// boxes, and lists of the k best. Part of each such rule's kernel source.
#pragma once

#include "../ranked.h"
#include "image_work.h"

namespace mg_ops {

// The centers of the anchors of a tile.
struct alignas(64) PointTile {
  float x[kTileSize], y[kTileSize];
};

// A box for each tile, so that a slot is compared with tiles by the vector; behind the last tile boxes that hold
// nothing.
struct TileBoxes {
  float *x1, *y1, *x2, *y2;

  void set(int64_t tile, const Box& box) {
    x1[tile] = box.x1;
    y1[tile] = box.y1;
    x2[tile] = box.x2;
    y2[tile] = box.y2;
  }
};

struct RankedWork : ImageWork {
  // Per anchor, padded to whole tiles (place_points): 34 bytes with the predicted boxes, 13 without.
  Block point_block;
  PointTile* points;
  TileBoxes points_bounds;  // around those of each tile that are anywhere
  BoxTile* predicted;       // null: the rule reads no predicted boxes
  TileBoxes predicted_bounds;
  int32_t* selecting_owner;  // the slot that an anchor is to belong to, or one of the two below

  // Per slot (place_lists).
  Block list_block;
  float *gate_x1, *gate_y1, *gate_x2, *gate_y2;  // the box that an anchor's center must be inside of
  float *largest_metric, *largest_overlap;       // of the anchors that are the slot's in the end
  int32_t* num_selected;
  uint64_t* selected;  // (num_slots, list_stride) the keys of the anchors that each selects, in any order
  int64_t list_stride;
};

namespace MG_OPS_CPU_TARGET {
namespace {

// Values of selecting_owner that are no slot.
constexpr int32_t kNobody = -1;
constexpr int32_t kContested = -2;  // several slots want the anchor, and others may have it too

// The k largest of the keys that it is shown.
class BestKeys {
 public:
  explicit BestKeys(int32_t k) : k_(k) {}

  // No key up to this one can be among them; 0 as long as every anchor can.
  uint64_t floor() const { return floor_; }

  void add(uint64_t key) {
    if (key <= floor_) {
      return;
    }
    keys_[size_++] = key;
    if (size_ == 2 * k_) {
      shrink();
    }
  }

  // Raises the floor as far as it goes.
  void settle() {
    if (size_ >= k_) {
      shrink();
    }
  }

  // Writes them in any order; returns how many there are.
  int32_t take(uint64_t* keys) {
    if (size_ > k_) {
      shrink();
    }
    std::memcpy(keys, keys_, static_cast<size_t>(size_) * sizeof *keys);
    return size_;
  }

 private:
  void shrink() {
    std::nth_element(keys_, keys_ + (k_ - 1), keys_ + size_, [](uint64_t a, uint64_t b) { return a > b; });
    size_ = k_;
    floor_ = keys_[k_ - 1];
  }

  int32_t k_, size_ = 0;
  uint64_t floor_ = 0;
  uint64_t keys_[2 * kMaxK];
};

MG_OPS_INLINE RankedWork& ranked(ImageWork& work) { return static_cast<RankedWork&>(work); }

constexpr Box kNoBounds = {kMaxFloat, kMaxFloat, -kMaxFloat, -kMaxFloat};
constexpr int64_t kTileBlock = 16;

// Returns how many bytes the arrays of the anchors need.
static size_t place_points(RankedWork& work, bool with_predicted, char* memory) {
  Placing placing{memory};
  const int64_t padded = (work.num_tiles + kTileBlock - 1) / kTileBlock * kTileBlock;
  const auto place_boxes = [&](TileBoxes& boxes) {
    placing.place(boxes.x1, padded);
    placing.place(boxes.y1, padded);
    placing.place(boxes.x2, padded);
    placing.place(boxes.y2, padded);
    for (int64_t tile = work.num_tiles; memory != nullptr && tile < padded; ++tile) {
      boxes.set(tile, kNoBounds);
    }
  };
  placing.place(work.points, work.num_tiles);
  place_boxes(work.points_bounds);
  if (with_predicted) {
    placing.place(work.predicted, work.num_tiles);
    place_boxes(work.predicted_bounds);
  }
  placing.place(work.selecting_owner, work.num_tiles * kTileSize);
  return placing.bytes;
}

static size_t place_lists(RankedWork& work, int64_t padded_slots, int64_t list_stride, char* memory) {
  Placing placing{memory};
  placing.place(work.gate_x1, padded_slots);
  placing.place(work.gate_y1, padded_slots);
  placing.place(work.gate_x2, padded_slots);
  placing.place(work.gate_y2, padded_slots);
  placing.place(work.largest_metric, padded_slots);
  placing.place(work.largest_overlap, padded_slots);
  placing.place(work.num_selected, padded_slots);
  placing.place(work.selected, padded_slots * list_stride);
  return placing.bytes;
}

static void destroy_ranked(ImageWork* work) {
  if (work != nullptr) {
    std::free(ranked(*work).point_block.memory);
    std::free(ranked(*work).list_block.memory);
  }
  destroy_work(work);
}

template <bool kWithPredicted, class Work = RankedWork>
static ImageWork* create_ranked(const MatchProblem& problem, const BoxTile* anchor_tiles) {
  Work* work = new_work<Work>(problem, anchor_tiles);
  if (work == nullptr) {
    return nullptr;
  }
  if (!reserve(work->point_block, place_points(*work, kWithPredicted, nullptr))) {
    destroy_ranked(work);
    return nullptr;
  }
  place_points(*work, kWithPredicted, work->point_block.memory);
  return work;
}

// Reads the objects of an image, with room for `list_stride` anchors that each selects; all of them background so far.
static bool begin_ranked(RankedWork& work, int64_t image, int64_t list_stride) {
  const MatchProblem& problem = *work.problem;
  fill_row(problem.cls_match + image * problem.num_anchors, problem.num_anchors);
  if (!read_objects(work, image)) {
    return false;
  }
  const int64_t padded = (work.num_slots + kSlotBlock - 1) / kSlotBlock * kSlotBlock;
  if (!reserve(work.list_block, place_lists(work, padded, list_stride, nullptr))) {
    return false;
  }
  place_lists(work, padded, list_stride, work.list_block.memory);
  work.list_stride = list_stride;
  for (int64_t slot = 0; slot < padded; ++slot) {  // those behind the last one are inside of nothing
    work.gate_x1[slot] = work.x1[slot];
    work.gate_y1[slot] = work.y1[slot];
    work.gate_x2[slot] = work.x2[slot];
    work.gate_y2[slot] = work.y2[slot];
    work.num_selected[slot] = 0;
    work.largest_metric[slot] = work.largest_overlap[slot] = 0.0f;
  }
  return true;
}

// The centers of a tile's anchors; behind the last one there is nothing anywhere.
static void load_points(RankedWork& work, int64_t tile_index) {
  const MatchProblem& problem = *work.problem;
  PointTile& tile = work.points[tile_index];
  const int64_t count = tile_count(problem, tile_index);
  alignas(64) float x1[kTileSize], y1[kTileSize], x2[kTileSize], y2[kTileSize];
  load_columns(problem.anchors, 0, tile_index * kTileSize, count, x1, y1, x2, y2);
  Box bounds = kNoBounds;
  for (int64_t i = 0; i < kTileSize; ++i) {
    const Point point = i < count ? box_center({x1[i], y1[i], x2[i], y2[i]}) : kNowhere;
    tile.x[i] = point.x;
    tile.y[i] = point.y;
    const bool somewhere = point.x != kNowhere.x || point.y != kNowhere.y;
    bounds.x1 = somewhere ? min_float(bounds.x1, point.x) : bounds.x1;
    bounds.y1 = somewhere ? min_float(bounds.y1, point.y) : bounds.y1;
    bounds.x2 = somewhere ? max_float(bounds.x2, point.x) : bounds.x2;
    bounds.y2 = somewhere ? max_float(bounds.y2, point.y) : bounds.y2;
  }
  work.points_bounds.set(tile_index, bounds);
}

static void load_predicted(RankedWork& work, int64_t tile_index) {
  BoxTile& tile = work.predicted[tile_index];
  load_regressed_tile(work, tile_index, tile);
  work.predicted_bounds.set(tile_index, tile.bounds);
}

MG_OPS_INLINE Point anchor_point(const RankedWork& work, uint32_t anchor) {
  const PointTile& tile = work.points[anchor / kTileSize];
  return {tile.x[anchor % kTileSize], tile.y[anchor % kTileSize]};
}

MG_OPS_INLINE Box predicted_box(const RankedWork& work, uint32_t anchor, float& area) {
  const BoxTile& tile = work.predicted[anchor / kTileSize];
  const int64_t i = anchor % kTileSize;
  area = tile.area[i];
  return {tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]};
}

MG_OPS_INLINE Box gate_of(const RankedWork& work, int64_t slot) {
  return {work.gate_x1[slot], work.gate_y1[slot], work.gate_x2[slot], work.gate_y2[slot]};
}

MG_OPS_INLINE Box object_of(const ImageWork& work, int64_t slot) {
  return {work.x1[slot], work.y1[slot], work.x2[slot], work.y2[slot]};
}

// The place of an anchor's score for a slot's class, which is known.
MG_OPS_INLINE int64_t score_place(const ImageWork& work, uint32_t anchor, int64_t slot) {
  const FloatInput& scores = work.problem->cls_scores;
  return work.image * scores.image_stride + anchor * scores.row_stride + work.label[slot] * scores.column_stride;
}

// Scores lie apart, each in a cache line of its own: several asked for here arrive together.
MG_OPS_INLINE void prefetch_score(const ImageWork& work, uint32_t anchor, int64_t slot) {
  const FloatInput& scores = work.problem->cls_scores;
  if (work.label[slot] >= 0) {
    const int64_t place = score_place(work, anchor, slot) * bytes_of(scores.type);
    __builtin_prefetch(static_cast<const char*>(scores.data) + place);
  }
}

// p of an anchor for a slot's class.
MG_OPS_INLINE float probability_of(const ImageWork& work, uint32_t anchor, int64_t slot) {
  if (work.label[slot] < 0) {
    return 0.0f;
  }
  const float score = load_float(work.problem->cls_scores, score_place(work, anchor, slot));
  return class_probability(score, work.problem->scores_are_probabilities);
}

// Adds up the sums that a sum is made of.
MG_OPS_INLINE float add_lanes(float* sums) {
  for (int64_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      sums[lane] += sums[lane + half];
    }
  }
  return sums[0];
}

// Which points of a tile are inside of a box by more than a margin. Whether any is.
MG_OPS_INLINE bool find_inside(const PointTile& tile, const Box& gate, float margin, uint8_t* inside) {
  uint8_t any = 0;
  for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
    inside[i] = is_inside({tile.x[i], tile.y[i]}, gate, margin);
    any |= inside[i];
  }
  return any != 0;
}

// Calls visit(i) for each of these bytes that is 1, in ascending order.
template <int64_t kCount, class Visit>
MG_OPS_INLINE void for_marked(const uint8_t* marked, Visit visit) {
  uint64_t words[kCount / 8];
  std::memcpy(words, marked, sizeof words);
  for (int64_t word = 0; word < kCount / 8; ++word) {
    for (uint64_t bytes = words[word]; bytes != 0; bytes &= bytes - 1) {
      visit(8 * word + (__builtin_ctzll(bytes) >> 3));
    }
  }
}

// Calls visit(tile), in ascending order, for the tiles whose bounds overlap the box, and whose other bounds the other.
template <class Visit>
MG_OPS_INLINE void for_tiles_near(const RankedWork& work, const TileBoxes& bounds, const Box& box,
                                  const TileBoxes& other_bounds, const Box& other_box, Visit visit) {
  const auto overlaps = [](const TileBoxes& boxes, int64_t tile, const Box& with) {
    return overlap({boxes.x1[tile], boxes.y1[tile], boxes.x2[tile], boxes.y2[tile]}, with);
  };
  for (int64_t begin = 0; begin < work.num_tiles; begin += kTileBlock) {
    alignas(16) uint8_t near[kTileBlock];
    for (int64_t i = 0; i < kTileBlock; ++i) {  // vector loop
      near[i] = overlaps(bounds, begin + i, box) & overlaps(other_bounds, begin + i, other_box);
    }
    for_marked<kTileBlock>(near, [&](int64_t i) { visit(begin + i); });
  }
}

// Calls visit(slot, anchor, place) for all that is selected, slots ascending; `place` is that in work.selected.
template <class Visit>
MG_OPS_INLINE void for_selected(const RankedWork& work, Visit visit) {
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    const int64_t begin = slot * work.list_stride;
    for (int64_t place = begin; place < begin + work.num_selected[slot]; ++place) {
      visit(slot, key_index(work.selected[place]), place);
    }
  }
}

}  // namespace
}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
