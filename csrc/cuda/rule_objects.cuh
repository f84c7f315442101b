// What the kernels of all rules do with objects: read them once a call, bring them to the threads of a block, and skip
// those that a warp's anchors have nothing to do with.
#pragma once

#include <cstdint>
#include <type_traits>

#include "block_select.cuh"
#include "image_starts.cuh"

// Static shared memory of a kernel.
#ifndef MG_OPS_SHARED
#define MG_OPS_SHARED(Type, name) __shared__ Type name
#endif

namespace mg_ops::cuda::rules {

enum class ObjectKind : int32_t { kNone = 0, kObject = 1, kCrowd = 2 };

// An object as the kernels read it: one 32-byte sector.
struct alignas(32) Object {
  Box box;
  float area;
  int32_t label;  // -1: not a class
  ObjectKind kind;
  int32_t unused;
};

// What prepare_kernel writes; a rule's launched problem has it beside its own.
struct ObjectScratch {
  Object* objects;        // (N,)
  Word64* best;           // (N,) claim_key(quality, anchor) of each object's best anchor; 0: every quality is 0
  int32_t* image_starts;  // (B + 1,) gt_offsets, clamped: within 0 and N, and never decreasing
};

// Points arrays into one allocation, aligned to 32 bytes; with a null pointer it only counts their bytes.
struct Placing {
  char* memory;
  size_t bytes = 0;

  template <class T>
  void place(T*& array, int64_t count) {
    array = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + bytes);
    bytes += (static_cast<size_t>(count) * sizeof(T) + 31) / 32 * 32;
  }
};

inline void place_objects(Placing& placing, ObjectScratch& scratch, const MatchProblem& problem) {
  placing.place(scratch.objects, problem.num_gt);
  placing.place(scratch.best, problem.num_gt);
  placing.place(scratch.image_starts, problem.batch_size + 1);
}

// The objects of an image: number `first` to `first + count` of the packed ones.
struct ImageObjects {
  uint32_t first, count;
};

// --- prepare ---------------------------------------------------------------------------------------------------------

// A thread an object: reads it, and zeros what later kernels count. Objects past every offset are read too; no image
// has them.
MG_OPS_DEVICE void prepare_objects(const MatchProblem& problem, const ObjectScratch& scratch) {
  if (blockIdx.x == 0 && warp_index() == 0) {
    write_image_starts(problem, scratch.image_starts);
  }
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= problem.num_gt) {
    return;
  }
  Object object{};
  const bool crowd = problem.gt_crowd != nullptr && __ldg(problem.gt_crowd + index * problem.crowd_stride) != 0;
  const Box box = load_row(problem.gt_boxes, 0, index);
  object.box = finite_or_empty(box);
  object.area = box_area(object.box);
  const int64_t label = load_integer(problem.gt_labels, index);
  object.label = label >= 0 && label < problem.num_classes ? static_cast<int32_t>(label) : -1;
  object.kind = !is_object(box) ? ObjectKind::kNone : crowd ? ObjectKind::kCrowd : ObjectKind::kObject;
  scratch.objects[index] = object;
  scratch.best[index] = 0;
  problem.num_pos[index] = 0;
}

// The objects of an image, once image_starts is written.
MG_OPS_DEVICE ImageObjects objects_of(const ObjectScratch& scratch, uint32_t image) {
  const uint32_t first = static_cast<uint32_t>(scratch.image_starts[image]);
  return {first, static_cast<uint32_t>(scratch.image_starts[image + 1]) - first};
}

MG_OPS_DEVICE uint32_t blocks_an_image(const MatchProblem& problem) {
  return (static_cast<uint32_t>(problem.num_anchors) + kThreads - 1) / kThreads;
}

// --- pairs -----------------------------------------------------------------------------------------------------------

// Floats as integers of the same order, for integer reductions across a warp.
MG_OPS_DEVICE uint32_t ordered_bits(float x) {
  const uint32_t bits = float_bits(x);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
MG_OPS_DEVICE float from_ordered_bits(uint32_t ordered) {
  return bits_float(ordered ^ ((ordered >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

// The box around the boxes of a warp's lanes that count. Every lane must call it.
MG_OPS_DEVICE Box warp_bounds(const Box& box, bool counts) {
  const uint32_t x1 = __reduce_min_sync(kAllLanes, counts ? ordered_bits(box.x1) : ordered_bits(kMaxFloat));
  const uint32_t y1 = __reduce_min_sync(kAllLanes, counts ? ordered_bits(box.y1) : ordered_bits(kMaxFloat));
  const uint32_t x2 = __reduce_max_sync(kAllLanes, counts ? ordered_bits(box.x2) : ordered_bits(-kMaxFloat));
  const uint32_t y2 = __reduce_max_sync(kAllLanes, counts ? ordered_bits(box.y2) : ordered_bits(-kMaxFloat));
  return {from_ordered_bits(x1), from_ordered_bits(y1), from_ordered_bits(x2), from_ordered_bits(y2)};
}

// Whether a box of a size overlaps anything at all.
MG_OPS_DEVICE bool has_size(const Box& box) { return box.x2 > box.x1 && box.y2 > box.y1; }

// Whether a box inside `bounds` can overlap `box`.
MG_OPS_DEVICE bool can_overlap(const Box& bounds, const Box& box) {
  return bounds.x1 < box.x2 && box.x1 < bounds.x2 && bounds.y1 < box.y2 && box.y1 < bounds.y2;
}

// Raises best[object] to the largest order in the warp, at the lowest anchor that has it. Every lane must call it.
MG_OPS_DEVICE void raise_best(Word64* best, uint32_t object, uint32_t order, uint32_t anchor) {
  const uint32_t largest = __reduce_max_sync(kAllLanes, order);
  if (largest == 0) {
    return;
  }
  const uint32_t holders = __ballot_sync(kAllLanes, order == largest);
  if (lane_index() == __ffs(static_cast<int>(holders)) - 1) {
    atomicMax(best + object, static_cast<Word64>(claim_key(largest, anchor)));
  }
}

struct StagedObjects {
  Object object[kThreads];
};

// Calls visit(object, index of it in the image), in ascending order, for the objects of an image of which
// is_near(object, index) holds; by all lanes of a warp for the same ones. is_near is asked for another object in each
// lane. Every thread of a block must call it.
template <class IsNear, class Visit>
MG_OPS_DEVICE void for_objects(const ObjectScratch& scratch, ImageObjects objects, StagedObjects& shared,
                               IsNear is_near, Visit visit) {
  for (uint32_t first = 0; first < objects.count; first += kThreads) {
    __syncthreads();  // all are done with what was staged before
    const uint32_t left = objects.count - first;
    const int staged = left < kThreads ? static_cast<int>(left) : kThreads;
    if (static_cast<int>(threadIdx.x) < staged) {
      shared.object[threadIdx.x] = scratch.objects[objects.first + first + threadIdx.x];
    }
    __syncthreads();
    for (int group = 0; group < staged; group += 32) {
      const int tested = group + lane_index();
      const bool near = tested < staged && is_near(shared.object[tested], first + static_cast<uint32_t>(tested));
      for (uint32_t near_ones = __ballot_sync(kAllLanes, near); near_ones != 0; near_ones &= near_ones - 1) {
        const int place = group + __ffs(static_cast<int>(near_ones)) - 1;
        visit(shared.object[place], first + static_cast<uint32_t>(place));
      }
    }
  }
}

}  // namespace mg_ops::cuda::rules
