// Dynamic mutual matching of a batch on a GPU in four launches, for any number of anchors and objects. No torch in
// here.
//
//   prepare_kernel  reads the objects.
//   claim_kernel    a thread an anchor, the objects of its image: its best object for each task, and the boxes around
//                   groups of 32.
//   select_kernel   a block an object and task: how many of the anchors that it owns it selects, and the last of them.
//   label_kernel    a thread an anchor: its labels and qualities.
//
// Every result is a maximum of integer keys, or the sum of the same numbers in the same order, so the order in which
// blocks run does not matter.
#pragma once

#include "../dynamic_mutual.h"
#include "ranked.cuh"

namespace mg_ops::cuda::rules::dynamic_mutual {

constexpr int kTasks = 2;  // classification, localization

// The matches hold the claims between the launches: claim_key(quality, object), or 0.
struct LaunchedDynamicMutual : DynamicMutualProblem {
  ObjectScratch scratch;
  Word64* least_key[kTasks];  // (N,) of the anchors that each object selects
  Box* bounds[kTasks];        // (B, A / 32) and (A / 32), rounded up: around the boxes that make the qualities
};

// As max_iou_match_kernels.cuh's: 56 bytes an object, half a byte an anchor and image, and the offsets.
inline size_t place_scratch(LaunchedDynamicMutual& problem, char* memory) {
  Placing placing{memory};
  const int64_t num_groups = problem.num_gt > 0 ? (problem.num_anchors + 31) / 32 : 0;
  place_objects(placing, problem.scratch, problem);
  placing.place(problem.least_key[0], problem.num_gt);
  placing.place(problem.least_key[1], problem.num_gt);
  placing.place(problem.bounds[0], problem.batch_size * num_groups);
  placing.place(problem.bounds[1], num_groups);
  return placing.bytes;
}

MG_OPS_DEVICE int64_t place_of(const MatchProblem& problem, uint32_t image, uint32_t anchor) {
  return static_cast<int64_t>(image) * problem.num_anchors + anchor;
}

MG_OPS_DEVICE int64_t* match_of(const DynamicMutualProblem& problem, int task) {
  return task == 0 ? problem.cls_match : problem.loc_match;
}

__global__ void __launch_bounds__(kThreads, 4) prepare_kernel(const __grid_constant__ LaunchedDynamicMutual problem) {
  prepare_objects(problem, problem.scratch);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < problem.num_gt) {
    problem.num_loc_pos[index] = 0;
  }
}

// The best object of an anchor so far; an order of 0: none.
struct Claim {
  uint32_t order, owner;
};

MG_OPS_DEVICE void add_object(Claim& claim, float quality, uint32_t object) {
  if (iou_order(quality) > claim.order) {  // objects ascend: on a tie the lower one stays
    claim = {iou_order(quality), object};
  }
}

MG_OPS_DEVICE int64_t key_of(const Claim& claim) {
  return claim.order != 0 ? static_cast<int64_t>(claim_key(claim.order, claim.owner)) : 0;
}

__global__ void __launch_bounds__(kThreads, 4) claim_kernel(const __grid_constant__ LaunchedDynamicMutual problem) {
  MG_OPS_SHARED(StagedObjects, shared);
  const uint32_t blocks = blocks_an_image(problem);
  const uint32_t image = blockIdx.x / blocks;
  const uint32_t anchor = (blockIdx.x % blocks) * kThreads + threadIdx.x;
  const bool exists = anchor < problem.num_anchors;
  const Box box = exists ? finite_or_empty(load_row(problem.anchors, 0, anchor)) : Box{};
  const Box cls_box = exists && problem.classification_by_regressed ? load_pred(problem, image, anchor, box) : box;
  const float area = box_area(box), cls_area = box_area(cls_box);
  const Box bounds = warp_bounds(box, has_size(box)), cls_bounds = warp_bounds(cls_box, has_size(cls_box));
  const float most = most_amplification(problem);
  Claim of_classes{0, 0}, of_boxes{0, 0};
  for_objects(
      problem.scratch, objects_of(problem.scratch, image), shared,
      [&](const Object& object, uint32_t) {
        return object.kind == ObjectKind::kObject &&
               (can_overlap(bounds, object.box) || can_overlap(cls_bounds, object.box));
      },
      [&](const Object& object, uint32_t index) {
        add_object(of_classes, box_iou(cls_box, cls_area, object.box, object.area), index);
        float quality = box_iou(box, area, object.box, object.area);
        if (problem.localization_by_amplified && quality > 0.0f) {
          const float possible = quality * most;
          if (iou_order(possible < 1.0f ? possible : 1.0f) <= of_boxes.order) {
            return;  // whatever its score
          }
          quality = amplified_quality(quality, load_probability(problem, image, anchor, object.label), problem.sigma);
        }
        add_object(of_boxes, quality, index);
      });
  if (exists) {
    problem.cls_match[place_of(problem, image, anchor)] = key_of(of_classes);
    problem.loc_match[place_of(problem, image, anchor)] = key_of(of_boxes);
    if (lane_index() == 0) {
      problem.bounds[0][static_cast<int64_t>(image) * count_groups(problem) + anchor / 32] = cls_bounds;
      if (image == 0) {
        problem.bounds[1][anchor / 32] = bounds;
      }
    }
  }
}

struct SelectShared {
  SelectedShared best;
  Word64 found[kMaxK];  // by rank
};

__global__ void __launch_bounds__(kThreads, 4) select_kernel(const __grid_constant__ LaunchedDynamicMutual problem) {
  MG_OPS_SHARED(SelectShared, shared);
  const int task = static_cast<int>(blockIdx.x % kTasks);
  const uint32_t number = blockIdx.x / kTasks;
  const Object object = problem.scratch.objects[number];
  const uint32_t image = image_of(problem, problem.scratch, number);
  if (object.kind != ObjectKind::kObject || image == problem.batch_size) {
    return;
  }
  const uint32_t index = number - static_cast<uint32_t>(problem.scratch.image_starts[image]);
  const int64_t* claims = match_of(problem, task) + place_of(problem, image, 0);
  const Box* bounds =
      task == 0 ? problem.bounds[0] + static_cast<int64_t>(image) * count_groups(problem) : problem.bounds[1];
  const uint32_t num_best = for_best_of_groups(
      problem, static_cast<uint32_t>(problem.k), shared.best,
      [&](uint32_t group) { return can_overlap(bounds[group], object.box); },
      [&](uint32_t anchor, Word64) -> Word64 {
        const Word64 claim = static_cast<Word64>(claims[anchor]);
        return claim != 0 && key_index(claim) == index ? claim_key(key_order(claim), anchor) : 0;
      },
      [&](Word64 key, uint32_t rank) { shared.found[rank] = key; });
  __syncthreads();
  if (threadIdx.x != 0 || num_best == 0) {
    return;
  }
  float total = 0.0f;
  for (uint32_t i = 0; i < num_best; ++i) {
    total += bits_float(key_order(shared.found[i]));
  }
  // No quality is above 1, so it selects no more than were added up.
  const int32_t count = count_to_select(total, num_best);
  problem.least_key[task][number] = shared.found[count - 1];
  (task == 0 ? problem.num_pos : problem.num_loc_pos)[number] = count;
}

__global__ void __launch_bounds__(kThreads, 4) label_kernel(const __grid_constant__ LaunchedDynamicMutual problem) {
  MG_OPS_SHARED(StagedObjects, shared);
  const uint32_t blocks = blocks_an_image(problem);
  const uint32_t image = blockIdx.x / blocks;
  const uint32_t anchor = (blockIdx.x % blocks) * kThreads + threadIdx.x;
  const bool exists = anchor < problem.num_anchors;
  const bool has_objects = problem.num_gt > 0;  // else the other kernels did not run
  const ImageObjects objects = has_objects ? objects_of(problem.scratch, image) : ImageObjects{0, 0};
  bool covered = false;
  if (has_objects && problem.gt_crowd != nullptr) {
    const Box box = exists ? finite_or_empty(load_row(problem.anchors, 0, anchor)) : Box{};
    const float area = box_area(box);
    const Box bounds = warp_bounds(box, has_size(box));
    for_objects(
        problem.scratch, objects, shared,
        [&](const Object& object, uint32_t) {
          return object.kind == ObjectKind::kCrowd && can_overlap(bounds, object.box);
        },
        [&](const Object& object, uint32_t) {
          covered |= positive_ratio(intersection_area(box, object.box), area) >= problem.crowd_overlap;
        });
  }
  if (!exists) {
    return;
  }
  const int64_t place = place_of(problem, image, anchor);
  for (int task = 0; task < kTasks; ++task) {
    int64_t* match = match_of(problem, task) + place;
    const Word64 claim = has_objects ? static_cast<Word64>(*match) : 0;
    int64_t label = task == 0 && covered ? kIgnored : kBackground;
    float quality = 0.0f;
    if (claim != 0) {
      const uint32_t owner = key_index(claim);
      if (claim_key(key_order(claim), anchor) >= problem.least_key[task][objects.first + owner]) {
        label = static_cast<int64_t>(owner);
        quality = bits_float(key_order(claim));
      }
    }
    __stcs(match, label);
    (task == 0 ? problem.soft_targets : problem.loc_weights)[place] = quality;
  }
}

// Calls launch(grid, kernel) for each kernel, in order. The grids depend on the sizes alone.
template <typename LaunchKernel>
void launch_dynamic_mutual_match(const LaunchedDynamicMutual& problem, LaunchKernel launch) {
  const int64_t anchor_blocks = problem.batch_size * ((problem.num_anchors + kThreads - 1) / kThreads);
  if (problem.num_gt > 0) {
    launch((problem.num_gt + kThreads - 1) / kThreads, prepare_kernel);
    if (anchor_blocks > 0) {
      launch(anchor_blocks, claim_kernel);
      launch(problem.num_gt * kTasks, select_kernel);
    }
  }
  if (anchor_blocks > 0) {
    launch(anchor_blocks, label_kernel);
  }
}

}  // namespace mg_ops::cuda::rules::dynamic_mutual
