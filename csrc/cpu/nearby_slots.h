// The slots by their place in the image, to find those around a point or a box among many. Part of a kernel's source.
#pragma once

#include "ranked.h"

namespace mg_ops {

// A box of each slot, those of near slots side by side: few of them are looked at to find those around a point or a
// box.
struct NearbySlots {
  int64_t num_blocks;
  uint64_t* order;       // the slots along a curve through the image, each behind its place on the curve
  BoundingBoxes boxes;   // of whole blocks
  BoundingBoxes bounds;  // around each block

  int32_t slot(int64_t i) const { return static_cast<int32_t>(order[i] & 0xffffffffu); }
};

namespace MG_OPS_CPU_TARGET {
namespace {

// Returns how many bytes the arrays of this many slots need.
static size_t place_nearby(NearbySlots& nearby, int32_t num_slots, char* memory) {
  Placing placing{memory};
  nearby.num_blocks = (num_slots + kSlotBlock - 1) / kSlotBlock;
  const int64_t padded_blocks = (nearby.num_blocks + kSlotBlock - 1) / kSlotBlock * kSlotBlock;
  placing.place(nearby.order, nearby.num_blocks * kSlotBlock);
  place_boxes(placing, nearby.boxes, nearby.num_blocks * kSlotBlock);
  place_boxes(placing, nearby.bounds, padded_blocks);
  return placing.bytes;
}

// The lower 16 bits, with a 0 between each two.
MG_OPS_INLINE uint64_t spread_bits(uint64_t bits) {
  bits = (bits | bits << 8) & 0x00ff00ff;
  bits = (bits | bits << 4) & 0x0f0f0f0f;
  bits = (bits | bits << 2) & 0x33333333;
  return (bits | bits << 1) & 0x55555555;
}

// Orders the slots by the centers of their boxes, box_of(slot), along a Z-order curve.
template <class BoxOf>
MG_OPS_INLINE void load_nearby(NearbySlots& nearby, int32_t num_slots, BoxOf box_of) {
  Box extent = kNoBounds;
  const auto extend = [](Box& bounds, const Box& box) {
    bounds = {min_float(bounds.x1, box.x1), min_float(bounds.y1, box.y1), max_float(bounds.x2, box.x2),
              max_float(bounds.y2, box.y2)};
  };
  for (int32_t slot = 0; slot < num_slots; ++slot) {
    extend(extent, box_of(slot));
  }
  // Any order is right, that of numbers too large for these differences too.
  const auto step_of = [](float begin, float end, float low, float high) {
    const float place = ((begin * 0.5f + end * 0.5f) - low) / (high - low) * 65535.0f;
    return place > 0.0f && place < 65535.0f ? static_cast<uint64_t>(place) : 0;
  };
  for (int32_t slot = 0; slot < num_slots; ++slot) {
    const Box box = box_of(slot);
    const uint64_t place = spread_bits(step_of(box.x1, box.x2, extent.x1, extent.x2)) |
                           spread_bits(step_of(box.y1, box.y2, extent.y1, extent.y2)) << 1;
    nearby.order[slot] = place << 32 | static_cast<uint32_t>(slot);
  }
  std::sort(nearby.order, nearby.order + num_slots);
  for (int64_t block = 0; block < (nearby.num_blocks + kSlotBlock - 1) / kSlotBlock * kSlotBlock; ++block) {
    Box bounds = kNoBounds;
    for (int64_t i = block * kSlotBlock; block < nearby.num_blocks && i < (block + 1) * kSlotBlock; ++i) {
      const Box box = i < num_slots ? box_of(nearby.slot(i)) : kNoBounds;
      nearby.boxes.set(i, box);
      extend(bounds, box);
    }
    nearby.bounds.set(block, bounds);
  }
}

// Calls visit(slot), in any order, for the slots whose box is wanted. A box in a wanted one need not be, but a box
// around a wanted one must be.
template <class IsWanted, class Visit>
MG_OPS_INLINE void for_nearby(const NearbySlots& nearby, IsWanted is_wanted, Visit visit) {
  alignas(16) uint8_t wanted_blocks[kSlotBlock], wanted[kSlotBlock];
  for (int64_t first = 0; first < nearby.num_blocks; first += kSlotBlock) {
    for (int64_t i = 0; i < kSlotBlock; ++i) {  // vector loop
      wanted_blocks[i] = is_wanted(nearby.bounds.get(first + i));
    }
    for_marked<kSlotBlock>(wanted_blocks, [&](int64_t block) {
      const int64_t begin = (first + block) * kSlotBlock;
      for (int64_t i = 0; i < kSlotBlock; ++i) {  // vector loop
        wanted[i] = is_wanted(nearby.boxes.get(begin + i));
      }
      for_marked<kSlotBlock>(wanted, [&](int64_t i) { visit(nearby.slot(begin + i)); });
    });
  }
}

}  // namespace
}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
