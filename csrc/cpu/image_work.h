// The scratch of the image in work: its memory, its objects, and which of them a tile may have something to do with.
// Part of mutual_match_kernel.cpp.
#pragma once

#include <cstdlib>

#include "tile.h"

namespace mg_ops {

// Memory of arrays that grow together.
struct Block {
  char* memory;
  size_t bytes;
};

// The scratch of the image in work. `slot` numbers the valid objects of the image, crowds excluded, in their order.
struct ImageWork {
  const MatchProblem* problem;
  const BoxTile* anchor_tiles;  // of all anchors, where many images share them; else null
  int64_t num_tiles;
  int64_t image;

  // Per anchor, padded to whole tiles (place_anchors). Qualities are stored by their order as unsigned integers, 0 for
  // none.
  Block anchor_block;
  uint32_t* anchor_quality;  // the largest q_anchor (iou_order)
  int32_t* anchor_owner;     // its slot
  uint32_t* quality;         // the same under q_regressed, then under q_amplified
  int32_t* owner;

  // Per slot (place_slots).
  Block slot_block;
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
  Block crowd_block;
  int32_t num_crowds;
  Box* crowds;

  // The lists of the selection.
  Block key_block;
  uint64_t* keys;
};

namespace MG_OPS_CPU_TARGET {
namespace {

// Slots are compared with a tile by the vector; behind the last one come boxes that nothing overlaps.
constexpr int32_t kSlotBlock = 16;

// ---------------------------------------------------------------------------------------------------------------------
// Memory: plain malloc, grown on demand and kept between the images of one call

static bool reserve(Block& block, size_t bytes) {
  if (bytes <= block.bytes) {
    return true;
  }
  std::free(block.memory);
  const size_t rounded = (bytes + 63) & ~size_t{63};
  block.memory = static_cast<char*>(std::aligned_alloc(64, rounded));
  block.bytes = block.memory != nullptr ? rounded : 0;
  return block.memory != nullptr;
}

// Points arrays into one block, each aligned to a cache line. With a null block it only counts their bytes.
struct Placing {
  char* memory;
  size_t bytes = 0;

  template <class T>
  void place(T*& array, int64_t count) {
    array = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + bytes);
    bytes += (static_cast<size_t>(count) * sizeof(T) + 63) & ~size_t{63};
  }
};

// Returns how many bytes the arrays of `count` anchors need.
static size_t place_anchors(ImageWork& work, int64_t count, char* memory) {
  Placing placing{memory};
  placing.place(work.anchor_quality, count);
  placing.place(work.anchor_owner, count);
  placing.place(work.quality, count);
  placing.place(work.owner, count);
  return placing.bytes;
}

// Returns how many bytes the arrays of `count` slots need.
static size_t place_slots(ImageWork& work, int64_t count, char* memory) {
  Placing placing{memory};
  placing.place(work.label, count);
  placing.place(work.best_by_anchor, count);
  placing.place(work.best, count);
  placing.place(work.x1, count);
  placing.place(work.y1, count);
  placing.place(work.x2, count);
  placing.place(work.y2, count);
  placing.place(work.area, count);
  placing.place(work.object, count);
  placing.place(work.cut, count);
  placing.place(work.expected_iou, count);
  placing.place(work.may_be_best_iou, count);
  placing.place(work.may_be_positive_iou, count);
  placing.place(work.enough_order, count);
  placing.place(work.look_again, count);
  placing.place(work.num_pos, count);
  placing.place(work.num_total, count);
  placing.place(work.list_size, count);
  placing.place(work.likely_order, count);
  placing.place(work.saved_value, count);
  placing.place(work.saved_owner, count);
  placing.place(work.list_begin, count + 1);  // one more for the end of the last list
  placing.place(work.list_floor, count + 1);  // and for the floor before the first
  if (memory != nullptr) {
    *work.list_floor++ = ~uint32_t{0};
  }
  return placing.bytes;
}

// Room for `count` slots and for the boxes that fill their last block.
static bool reserve_slots(ImageWork& work, int64_t count) {
  const int64_t padded = (count + kSlotBlock - 1) / kSlotBlock * kSlotBlock;
  if (!reserve(work.slot_block, place_slots(work, padded, nullptr))) {
    return false;
  }
  place_slots(work, padded, work.slot_block.memory);
  return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// The image and its objects

static void destroy_work(ImageWork* work) {
  if (work == nullptr) {
    return;
  }
  for (const Block& block : {work->anchor_block, work->slot_block, work->crowd_block, work->key_block}) {
    std::free(block.memory);
  }
  std::free(work);
}

// Scratch of a kind, all zero but for what it is made from. Null: out of memory.
template <class Work>
static Work* new_work(const MatchProblem& problem, const BoxTile* anchor_tiles) {
  Work* work = static_cast<Work*>(std::calloc(1, sizeof(Work)));
  if (work != nullptr) {
    work->problem = &problem;
    work->anchor_tiles = anchor_tiles;
    work->num_tiles = (problem.num_anchors + kTileSize - 1) / kTileSize;
  }
  return work;
}

static ImageWork* create_work(const MatchProblem& problem, const BoxTile* anchor_tiles) {
  ImageWork* work = new_work<ImageWork>(problem, anchor_tiles);
  if (work == nullptr) {
    return nullptr;
  }
  const int64_t padded = work->num_tiles * kTileSize;
  if (!reserve(work->anchor_block, place_anchors(*work, padded, nullptr))) {
    destroy_work(work);
    return nullptr;
  }
  place_anchors(*work, padded, work->anchor_block.memory);
  return work;
}

static int64_t count_slots(const ImageWork& work) { return work.num_slots; }

MG_OPS_INLINE void set_box_that_nothing_overlaps(ImageWork& work, int32_t slot) {
  work.x1[slot] = work.y1[slot] = kMaxFloat;
  work.x2[slot] = work.y2[slot] = -kMaxFloat;
  work.area[slot] = 0.0f;
}

static void fill_row(int64_t* row, int64_t count) { std::memset(row, 0xff, static_cast<size_t>(count) * sizeof *row); }

// Reads the objects of an image: the valid ones become slots, crowd regions are kept apart. False: out of memory.
static bool read_objects(ImageWork& work, int64_t image) {
  const DefaultFloatEnvironment environment;
  const MatchProblem& problem = *work.problem;
  work.image = image;
  work.num_slots = work.num_crowds = 0;
  work.all_anchor_pairs_seen = false;
  const int64_t begin = load_integer(problem.gt_offsets, image), end = load_integer(problem.gt_offsets, image + 1);
  if (!reserve_slots(work, end - begin)) {
    return false;
  }
  for (int64_t i = begin; i < end; ++i) {
    const Box box = load_box(problem.gt_boxes, i);
    if (!is_object(box)) {
      continue;
    }
    if (problem.gt_crowd != nullptr && problem.gt_crowd[i * problem.crowd_stride] != 0) {
      if (!reserve(work.crowd_block, static_cast<size_t>(end - begin) * sizeof(Box))) {
        return false;
      }
      work.crowds = reinterpret_cast<Box*>(work.crowd_block.memory);
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
  for (int32_t slot = work.num_slots; slot % kSlotBlock != 0; ++slot) {
    set_box_that_nothing_overlaps(work, slot);
  }
  return true;
}

// Fills the image's results with background and reads its objects.
static bool begin_image(ImageWork& work, int64_t image) {
  const MatchProblem& problem = *work.problem;
  fill_row(problem.cls_match + image * problem.num_anchors, problem.num_anchors);
  fill_row(problem.loc_match + image * problem.num_anchors, problem.num_anchors);
  return read_objects(work, image);
}

// ---------------------------------------------------------------------------------------------------------------------
// The tiles of the image

static void load_anchor_tiles(const MatchProblem& problem, int64_t tile_begin, int64_t tile_end, BoxTile* tiles) {
  const DefaultFloatEnvironment environment;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    load_anchor_tile(problem, tile, tiles[tile]);
  }
}

MG_OPS_INLINE const BoxTile& anchor_tile(const ImageWork& work, int64_t tile_index, BoxTile& own_tile) {
  if (work.anchor_tiles != nullptr) {
    return work.anchor_tiles[tile_index];
  }
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
  for (int64_t i = count; i < kTileSize; ++i) {
    dx[i] = dy[i] = dw[i] = dh[i] = 0.0f;
  }
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

// Predictions are asked for so many tiles ahead of their use.
constexpr int64_t kTilesAhead = 4;

// Asks for the predictions of a tile ahead of time: tiles run backwards, which the processor does not foresee.
static void prefetch_predictions(const ImageWork& work, int64_t tile) {
  const FloatInput& pred_boxes = work.problem->pred_boxes;
  const int64_t first = work.image * pred_boxes.image_stride + tile * kTileSize * pred_boxes.row_stride;
  with_type(pred_boxes, [&](auto* data) {
    if (pred_boxes.row_stride != 4 || pred_boxes.column_stride != 1) {
      return;
    }
    const char* begin = reinterpret_cast<const char*>(data + first);
    for (size_t byte = 0; byte < 4 * kTileSize * sizeof *data; byte += 64) {
      __builtin_prefetch(begin + byte);
    }
  });
}

// Bounds of the regressed boxes of a tile without decoding them: from the bounds of their anchors and the largest
// deltas. Looser than those of the decoded boxes, but a fraction of the work, and enough to leave out the many tiles
// that no object needs. False: no bounds, the boxes must be decoded.
static bool bound_regressed_tile(const ImageWork& work, int64_t tile_index, TileBounds& bounds) {
  const MatchProblem& problem = *work.problem;
  const FloatInput& deltas = problem.pred_boxes;
  if (!problem.decode || work.anchor_tiles == nullptr || deltas.type != FloatType::kFloat32) {
    return false;
  }
  if (deltas.row_stride != 4 || deltas.column_stride != 1 || tile_count(problem, tile_index) != kTileSize) {
    return false;
  }
  const float* rows = static_cast<const float*>(deltas.data) + work.image * deltas.image_stride +
                      tile_index * kTileSize * deltas.row_stride;
  // Four rows side by side. Magnitudes are compared as integers: a NaN is then the largest, and bounds nothing.
  constexpr int kLanes = 16;
  uint32_t largest[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    largest[lane] = 0;
  }
  for (int64_t i = 0; i < 4 * kTileSize; i += kLanes) {  // vector loop
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t magnitude = float_bits(rows[i + lane]) & 0x7fffffffu;
      largest[lane] = magnitude > largest[lane] ? magnitude : largest[lane];
    }
  }
  for (int lane = 0; lane < kLanes / 2; ++lane) {
    largest[lane] = std::max(largest[lane], largest[lane + kLanes / 2]);
  }
  for (int lane = 0; lane < kLanes / 4; ++lane) {
    largest[lane] = std::max(largest[lane], largest[lane + kLanes / 4]);
  }
  const BoxCoder& coder = problem.coder;
  const float shift_x = 1.001f * (bits_float(largest[0]) / coder.weight_x);
  const float shift_y = 1.001f * (bits_float(largest[1]) / coder.weight_y);
  const float grow_w = bits_float(largest[2]) / coder.weight_w, grow_h = bits_float(largest[3]) / coder.weight_h;
  if (!(grow_w <= 1.0f && grow_h <= 1.0f)) {
    return false;
  }
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

// Which anchors of a tile some crowd region covers by at least this share of their area. Whether any region is near.
static bool find_covered(const ImageWork& work, const BoxTile& tile, float crowd_overlap, int32_t* covered) {
  std::memset(covered, 0, kTileSize * sizeof *covered);
  bool any = false;
  for (int32_t k = 0; k < work.num_crowds; ++k) {
    const Box crowd = work.crowds[k];
    if (!overlap(tile.bounds, crowd)) {
      continue;
    }
    any = true;
    for (int64_t i = 0; i < kTileSize; ++i) {  // vector loop
      const Box box = {tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]};
      covered[i] |= positive_ratio(intersection_area(box, crowd), tile.area[i]) >= crowd_overlap;
    }
  }
  return any;
}

// Background that a crowd region covers becomes ignored, in a range of tiles whose labels are written.
static void ignore_crowds(const ImageWork& work, float crowd_overlap, int64_t tile_begin, int64_t tile_end) {
  const MatchProblem& problem = *work.problem;
  int64_t* row = problem.cls_match + work.image * problem.num_anchors;
  BoxTile own_tile;
  alignas(64) int32_t covered[kTileSize];
  for (int64_t tile = tile_begin; tile < tile_end && work.num_crowds > 0; ++tile) {
    if (!find_covered(work, anchor_tile(work, tile, own_tile), crowd_overlap, covered)) {
      continue;
    }
    const int64_t first = tile * kTileSize, count = tile_count(problem, tile);
    for (int64_t i = 0; i < count; ++i) {
      if (covered[i] != 0 && row[first + i] == kBackground) {
        row[first + i] = kIgnored;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The slots of a tile

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
    if ((words[0] | words[1]) == 0) {
      continue;
    }
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

// An upper bound of the IoU of any box of the tile with the slot's. No intersection is larger than what the bounds
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
      if (slots.possible_iou[i] >= needed_iou(slots.slot[i])) {
        visit(slots.slot[i], i);
      }
    }
  } else {
    int32_t i = 0;
    for_overlapping_slots(work, tile.bounds, [&](int32_t slot) { visit(slot, i++); });
  }
}

}  // namespace
}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
