// Task-aligned matching of a batch on a GPU in four launches, for any number of anchors and objects; five with
// k_after_conflict. No torch in here.
//
//   prepare_kernel  reads the objects, bounds groups of anchors, and empties the claims.
//   select_kernel   a block an object: its k best anchors, which it claims.
//   resolve_kernel  a thread an anchor: its owner, and what the owner's soft targets need.
//   keep_kernel     a block an object: its k_after_conflict best.
//   label_kernel    a thread an anchor: its label and soft target.
//
// Every result is a maximum or a sum of integers, so the order in which blocks run does not matter.
#pragma once

#include "../task_aligned.h"
#include "ranked.cuh"

namespace mg_ops::cuda::rules::task_aligned {

// The match holds the claims between the launches: how many objects have selected an anchor, in the upper half, and the
// sum of their indices; or with a conflict among those the key of the one that it overlaps most. Then the owner.
struct LaunchedTaskAligned : TaskAlignedProblem {
  RankedScratch scratch;
  Word64* least_key;                           // (N,) of the anchors that each object keeps
  uint32_t *largest_metric, *largest_overlap;  // (N,) of its anchors, as floats whose bits have their order
};

// As max_iou_match_kernels.cuh's: 56 bytes an object, half a byte an anchor, and the offsets.
inline size_t place_scratch(LaunchedTaskAligned& problem, char* memory) {
  Placing placing{memory};
  place_ranked(placing, problem.scratch, problem);
  placing.place(problem.least_key, problem.num_gt);
  placing.place(problem.largest_metric, problem.num_gt);
  placing.place(problem.largest_overlap, problem.num_gt);
  return placing.bytes;
}

// An owner as it stands in the match before the last launch. A covered anchor that is dropped becomes ignored.
constexpr Word64 kCoveredOwner = Word64{1} << 32;

MG_OPS_DEVICE int64_t place_of(const MatchProblem& problem, uint32_t image, uint32_t anchor) {
  return static_cast<int64_t>(image) * problem.num_anchors + anchor;
}

MG_OPS_DEVICE Word64* claim_of(const MatchProblem& problem, uint32_t image, uint32_t anchor) {
  return reinterpret_cast<Word64*>(problem.cls_match + place_of(problem, image, anchor));
}

struct PredictedBox {
  Box box;
  float area;
};

MG_OPS_DEVICE PredictedBox load_predicted(const MatchProblem& problem, uint32_t image, uint32_t anchor) {
  const Box anchor_box = problem.decode ? finite_or_empty(load_row(problem.anchors, 0, anchor)) : Box{};
  const Box box = load_pred(problem, image, anchor, anchor_box);
  return {box, box_area(box)};
}

MG_OPS_DEVICE float overlap_with(const TaskAlignedProblem& problem, const PredictedBox& predicted,
                                 const Object& object) {
  return pair_overlap(problem, predicted.box, predicted.area, object.box, object.area);
}

MG_OPS_DEVICE float metric_with(const TaskAlignedProblem& problem, uint32_t image, uint32_t anchor,
                                const Object& object, float overlap) {
  const float p = load_probability(problem, image, anchor, object.label);
  return pair_metric(problem, p, overlap, power(overlap, problem.beta));
}

__global__ void __launch_bounds__(kThreads, 4) prepare_kernel(const __grid_constant__ LaunchedTaskAligned problem) {
  prepare_objects(problem, problem.scratch);
  prepare_groups(problem, problem.scratch);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < problem.num_gt) {
    problem.least_key[index] = 0;
    problem.largest_metric[index] = problem.largest_overlap[index] = 0;
  }
  if (index < problem.batch_size * problem.num_anchors) {
    problem.cls_match[index] = 0;
  }
}

__global__ void __launch_bounds__(kThreads, 4) select_kernel(const __grid_constant__ LaunchedTaskAligned problem) {
  MG_OPS_SHARED(SelectedShared, shared);
  const Object object = problem.scratch.objects[blockIdx.x];
  const uint32_t image = image_of(problem, problem.scratch, blockIdx.x);
  if (object.kind != ObjectKind::kObject || image == problem.batch_size) {
    return;
  }
  const uint32_t index = blockIdx.x - static_cast<uint32_t>(problem.scratch.image_starts[image]);
  const Box gate = gate_box(object.box, problem.minimum_side);
  const float object_angle = box_angle(object.box);
  // Where x**beta is no product, it may be a little smaller for a larger x.
  const float slack = problem.beta.halves >= 0 ? 1.0f : 1.00001f;
  const auto key_of = [&](uint32_t anchor, Word64 floor) -> Word64 {
    if (problem.inside_first && !is_inside(load_point(problem, anchor), gate, problem.center_margin)) {
      return 0;
    }
    const PredictedBox predicted = load_predicted(problem, image, anchor);
    const float iou = box_iou(predicted.box, predicted.area, object.box, object.area);
    // p**alpha is at most 1, and CIoU at most IoU.
    const float possible = slack * power(iou, problem.beta);
    if (!(iou > 0.0f) || claim_key(iou_order(possible), anchor) <= floor) {
      return 0;
    }
    const float overlap = problem.by_ciou ? positive_ciou(predicted.box, object.box, object_angle, iou) : iou;
    const float metric = metric_with(problem, image, anchor, object, overlap);
    return metric > 0.0f ? claim_key(iou_order(metric), anchor) : 0;
  };
  for_best(
      problem, problem.scratch, static_cast<uint32_t>(problem.k), shared,
      [&](const Box& bounds) { return !problem.inside_first || can_be_inside(bounds, gate); }, key_of,
      [&](Word64 key, uint32_t) {
        const uint32_t anchor = key_index(key);
        if (!problem.inside_first && !is_inside(load_point(problem, anchor), gate, problem.center_margin)) {
          return;
        }
        if (problem.conflict != Conflict::kSelecting) {
          atomicAdd(claim_of(problem, image, anchor), (Word64{1} << 32) + index);
        } else {
          const float overlap = overlap_with(problem, load_predicted(problem, image, anchor), object);
          atomicMax(claim_of(problem, image, anchor), static_cast<Word64>(claim_key(iou_order(overlap), index)));
        }
      });
}

// What an object's soft targets are divided by, and multiplied with.
MG_OPS_DEVICE void raise_largest(const LaunchedTaskAligned& problem, uint32_t object, float metric, float overlap) {
  atomicMax(problem.largest_metric + object, float_bits(metric));
  atomicMax(problem.largest_overlap + object, float_bits(overlap));
}

__global__ void __launch_bounds__(kThreads, 4) resolve_kernel(const __grid_constant__ LaunchedTaskAligned problem) {
  MG_OPS_SHARED(StagedObjects, shared);
  const uint32_t blocks = blocks_an_image(problem);
  const uint32_t image = blockIdx.x / blocks;
  const uint32_t anchor = (blockIdx.x % blocks) * kThreads + threadIdx.x;
  const bool exists = anchor < problem.num_anchors;
  const ImageObjects objects = objects_of(problem.scratch, image);
  const Word64 claim = exists ? *claim_of(problem, image, anchor) : 0;
  const bool counted = problem.conflict != Conflict::kSelecting;
  const bool contested = counted && (claim >> 32) > 1;
  uint32_t owner = counted ? static_cast<uint32_t>(claim) : key_index(claim);

  const Point point = contested ? load_point(problem, anchor) : kNowhere;
  const PredictedBox predicted = claim != 0 ? load_predicted(problem, image, anchor) : PredictedBox{};
  const bool by_point = problem.conflict == Conflict::kInside;
  const Box rivals = warp_bounds(by_point ? Box{point.x, point.y, point.x, point.y} : predicted.box, contested);
  const auto may_have = [&](const Object& object) {
    return by_point ? can_be_inside(rivals, gate_box(object.box, problem.minimum_side))
                    : can_overlap(rivals, object.box);
  };
  const Box box = exists ? finite_or_empty(load_row(problem.anchors, 0, anchor)) : Box{};
  const float area = box_area(box);
  const Box boxes = warp_bounds(box, has_size(box));
  float most = -1.0f;
  bool covered = false;
  const bool has_work = contested || (problem.gt_crowd != nullptr && exists);
  const int some_work = __syncthreads_or(has_work ? 1 : 0);
  for_objects(
      problem.scratch, some_work != 0 ? objects : ImageObjects{objects.first, 0}, shared,
      [&](const Object& object, uint32_t) {
        return object.kind == ObjectKind::kCrowd ? can_overlap(boxes, object.box)
                                                 : object.kind == ObjectKind::kObject && may_have(object);
      },
      [&](const Object& object, uint32_t index) {
        if (object.kind == ObjectKind::kCrowd) {
          covered |= positive_ratio(intersection_area(box, object.box), area) >= problem.crowd_overlap;
        } else if (contested &&
                   (!by_point || is_inside(point, gate_box(object.box, problem.minimum_side), problem.center_margin))) {
          const float overlap = overlap_with(problem, predicted, object);
          if (overlap > most) {  // objects ascend: on a tie the lower one stays
            most = overlap;
            owner = index;
          }
        }
      });
  if (!exists) {
    return;
  }
  int64_t label = covered ? kIgnored : kBackground;
  if (claim != 0) {
    label = static_cast<int64_t>(owner);
    if (problem.k_after_conflict > 0) {
      label |= covered ? static_cast<int64_t>(kCoveredOwner) : 0;
    } else {
      const Object& object = problem.scratch.objects[objects.first + owner];
      const float overlap = overlap_with(problem, predicted, object);
      raise_largest(problem, objects.first + owner, metric_with(problem, image, anchor, object, overlap), overlap);
      atomicAdd(problem.num_pos + objects.first + owner, 1);
    }
  }
  problem.cls_match[place_of(problem, image, anchor)] = label;
}

__global__ void __launch_bounds__(kThreads, 4) keep_kernel(const __grid_constant__ LaunchedTaskAligned problem) {
  MG_OPS_SHARED(SelectedShared, shared);
  const Object object = problem.scratch.objects[blockIdx.x];
  const uint32_t image = image_of(problem, problem.scratch, blockIdx.x);
  if (object.kind != ObjectKind::kObject || image == problem.batch_size) {
    return;
  }
  const uint32_t index = blockIdx.x - static_cast<uint32_t>(problem.scratch.image_starts[image]);
  const uint32_t k = static_cast<uint32_t>(problem.k_after_conflict);
  const Box gate = gate_box(object.box, problem.minimum_side);
  const uint32_t count = for_best(
      problem, problem.scratch, k, shared,
      [&](const Box& bounds) { return problem.conflict == Conflict::kAll || can_be_inside(bounds, gate); },
      [&](uint32_t anchor, Word64) -> Word64 {
        const int64_t label = problem.cls_match[place_of(problem, image, anchor)];
        if (label < 0 || static_cast<uint32_t>(label) != index) {
          return 0;
        }
        const float overlap = overlap_with(problem, load_predicted(problem, image, anchor), object);
        const float metric = metric_with(problem, image, anchor, object, overlap);
        return metric > 0.0f ? claim_key(iou_order(metric), anchor) : 0;
      },
      [&](Word64 key, uint32_t rank) {
        const float overlap = overlap_with(problem, load_predicted(problem, image, key_index(key)), object);
        raise_largest(problem, blockIdx.x, bits_float(key_order(key)), overlap);
        if (rank + 1 == k) {
          problem.least_key[blockIdx.x] = key;
        }
      });
  if (threadIdx.x == 0) {
    problem.num_pos[blockIdx.x] = static_cast<int32_t>(count);
  }
}

__global__ void __launch_bounds__(kThreads, 4) label_kernel(const __grid_constant__ LaunchedTaskAligned problem) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= problem.batch_size * problem.num_anchors) {
    return;
  }
  if (problem.num_gt == 0) {  // the other kernels did not run
    __stcs(problem.cls_match + place, kBackground);
    problem.soft_targets[place] = 0.0f;
    return;
  }
  const int64_t label = problem.cls_match[place];
  float target = 0.0f;
  if (label >= 0) {
    const uint32_t image = static_cast<uint32_t>(place / problem.num_anchors);
    const uint32_t anchor = static_cast<uint32_t>(place % problem.num_anchors);
    const uint32_t number = static_cast<uint32_t>(problem.scratch.image_starts[image]) + static_cast<uint32_t>(label);
    const Object& object = problem.scratch.objects[number];
    const float overlap = overlap_with(problem, load_predicted(problem, image, anchor), object);
    const float metric = metric_with(problem, image, anchor, object, overlap);
    const bool kept = problem.k_after_conflict == 0 ||
                      (metric > 0.0f && claim_key(iou_order(metric), anchor) >= problem.least_key[number]);
    if (kept) {
      target = soft_target(problem, metric, bits_float(problem.largest_metric[number]),
                           bits_float(problem.largest_overlap[number]));
    }
    const int64_t dropped = (label & static_cast<int64_t>(kCoveredOwner)) != 0 ? kIgnored : kBackground;
    __stcs(problem.cls_match + place, kept ? static_cast<int64_t>(static_cast<uint32_t>(label)) : dropped);
  }
  problem.soft_targets[place] = target;
}

// Calls launch(grid, kernel) for each kernel, in order. The grids depend on the sizes alone.
template <typename LaunchKernel>
void launch_task_aligned_match(const LaunchedTaskAligned& problem, LaunchKernel launch) {
  const int64_t num_places = problem.batch_size * problem.num_anchors;
  const int64_t anchor_blocks = problem.batch_size * ((problem.num_anchors + kThreads - 1) / kThreads);
  if (problem.num_gt > 0) {
    const int64_t most = problem.num_gt > num_places ? problem.num_gt : num_places;
    launch((most + kThreads - 1) / kThreads, prepare_kernel);
    if (num_places > 0) {
      launch(problem.num_gt, select_kernel);
      launch(anchor_blocks, resolve_kernel);
      if (problem.k_after_conflict > 0) {
        launch(problem.num_gt, keep_kernel);
      }
    }
  }
  if (num_places > 0) {
    launch((num_places + kThreads - 1) / kThreads, label_kernel);
  }
}

}  // namespace mg_ops::cuda::rules::task_aligned
