// The selection: the best anchors that each slot owns under a quality, and the labels they get. Part of
// mutual_match_kernel.cpp.
#pragma once

#include "image_work.h"

namespace mg_ops {
namespace MG_OPS_CPU_TARGET {
namespace {

constexpr int64_t kListSlack = 8;

struct LargerKey {
  bool operator()(uint64_t a, uint64_t b) const { return a > b; }
};

MG_OPS_INLINE uint32_t smallest_order(const uint64_t* keys, int64_t size) {
  uint64_t smallest = ~uint64_t{0};
  for (int64_t i = 0; i < size; ++i) {
    smallest = keys[i] < smallest ? keys[i] : smallest;
  }
  return key_order(smallest);
}

// The first `count` of `size` keys become the `count` largest, in any order.
static void select_largest(uint64_t* keys, int64_t count, int64_t size) {
  if (count > 0 && count < size) {
    std::nth_element(keys, keys + count, keys + size, LargerKey{});
  }
}

// Adds to the lists the owned anchors whose quality is above their slot's list_floor, and keeps the num_kept best.
static void collect_owned(ImageWork& work, const uint32_t* quality, const int32_t* owner, const int32_t* num_kept) {
  uint32_t least_floor = ~uint32_t{0};
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    least_floor = std::min(least_floor, work.list_floor[slot]);
  }
  for (int64_t tile = 0; tile < work.num_tiles; ++tile) {
    const int64_t first = tile * kTileSize;
    // Most anchors are below: sort out whole tiles, then vectors. list_floor[-1], of those without an owner, lets none
    // pass.
    if (largest_order(quality + first) <= least_floor) {
      continue;
    }
    alignas(64) uint8_t above[kTileSize];
    for (int64_t i = 0; i < kTileSize; ++i) {
      above[i] = quality[first + i] > work.list_floor[owner[first + i]];
    }
    for (int64_t word = 0; word < kTileSize; word += 8) {
      uint64_t bytes;
      std::memcpy(&bytes, above + word, sizeof bytes);
      for (; bytes != 0; bytes &= bytes - 1) {
        const int64_t anchor = first + word + (__builtin_ctzll(bytes) >> 3);
        const int32_t slot = owner[anchor];
        if (quality[anchor] <= work.list_floor[slot]) {
          continue;  // the floor may have risen meanwhile
        }
        uint64_t* list = work.keys + work.list_begin[slot];
        int32_t size = work.list_size[slot];
        list[size++] = claim_key(quality[anchor], static_cast<uint32_t>(anchor));
        if (size == work.list_begin[slot + 1] - work.list_begin[slot]) {
          // Anchors ascend: from now on one of equal quality would come after all that are kept.
          const int32_t kept = num_kept[slot];
          select_largest(list, kept, size);
          size = kept;
          work.list_floor[slot] = smallest_order(list, kept);
        }
        work.list_size[slot] = size;
      }
    }
  }
}

// The list_size <= num_kept best of the anchors each slot owns under a quality. Looks first at those above
// `likely_order`, which should be enough of them, and once more at all where they are not.
static void select_owned(ImageWork& work, const uint32_t* quality, const int32_t* owner, const int32_t* num_kept,
                         const uint32_t* likely_order) {
  const int32_t num_slots = work.num_slots;
  for (int32_t slot = 0; slot < num_slots; ++slot) {
    work.list_size[slot] = 0;
    work.list_floor[slot] = likely_order[slot];
  }
  collect_owned(work, quality, owner, num_kept);
  bool too_few = false;
  for (int32_t slot = 0; slot < num_slots; ++slot) {
    const bool again = work.list_size[slot] < num_kept[slot] && likely_order[slot] > 0;
    work.list_floor[slot] = again ? 0 : ~uint32_t{0};
    if (again) {
      work.list_size[slot] = 0;
    }
    too_few |= again;
  }
  if (too_few) {
    collect_owned(work, quality, owner, num_kept);
  }
  for (int32_t slot = 0; slot < num_slots; ++slot) {
    select_largest(work.keys + work.list_begin[slot], num_kept[slot], work.list_size[slot]);
    work.list_size[slot] = std::min(work.list_size[slot], num_kept[slot]);
  }
}

// Writes the collected lists: the num_pos best of each become positives, the others are ignored.
static void write_classification(ImageWork& work) {
  int64_t* row = work.problem->cls_match + work.image * work.problem->num_anchors;
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    uint64_t* list = work.keys + work.list_begin[slot];
    const int32_t size = work.list_size[slot], num_pos = std::min(work.num_pos[slot], size);
    select_largest(list, num_pos, size);
    for (int32_t i = 0; i < size; ++i) {
      row[key_index(list[i])] = i < num_pos ? work.object[slot] : kIgnored;
    }
  }
}

static void write_localization(ImageWork& work) {
  int64_t* row = work.problem->loc_match + work.image * work.problem->num_anchors;
  for (int32_t slot = 0; slot < work.num_slots; ++slot) {
    uint64_t* list = work.keys + work.list_begin[slot];
    const int32_t size = work.list_size[slot], num_pos = std::min(work.num_pos[slot], size);
    select_largest(list, num_pos, size);
    for (int32_t i = 0; i < num_pos; ++i) {
      row[key_index(list[i])] = work.object[slot];
    }
  }
}

}  // namespace
}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
