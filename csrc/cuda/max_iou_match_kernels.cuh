// Max-IoU matching of a batch on a GPU in three launches, for any number of anchors and objects. No torch in here.
//
//   prepare_kernel  a thread an object: reads it.
//   claim_kernel    a thread an anchor, the objects of its image: the anchor's best object, and each object's best
//                   quality.
//   label_kernel    a thread an anchor: its label. Pairs are looked at again only of objects whose best quality is not
//                   above that of every anchor of the warp.
//
// Every result is a maximum of integer keys or a count, so the order in which blocks run does not matter.
#pragma once

#include "../max_iou.h"
#include "rule_objects.cuh"

namespace mg_ops::cuda::rules {

// The match holds the claims between the launches.
struct LaunchedMaxIou : MaxIouProblem {
  ObjectScratch scratch;
};

// Points the scratch of a problem whose sizes are set into one allocation. Returns how many bytes that needs; with a
// null pointer that is all it is for. 40 bytes an object, and the offsets.
inline size_t place_scratch(LaunchedMaxIou& problem, char* memory) {
  Placing placing{memory};
  place_objects(placing, problem.scratch, problem);
  return placing.bytes;
}

__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ LaunchedMaxIou problem) {
  prepare_objects(problem, problem.scratch);
}

MG_OPS_DEVICE Box load_anchor(const MatchProblem& problem, uint32_t anchor) {
  return anchor < problem.num_anchors ? finite_or_empty(load_row(problem.anchors, 0, anchor)) : Box{};
}

__global__ void __launch_bounds__(kThreads) claim_kernel(const __grid_constant__ LaunchedMaxIou problem) {
  MG_OPS_SHARED(StagedObjects, shared);
  const uint32_t blocks = blocks_an_image(problem);
  const uint32_t image = blockIdx.x / blocks;
  const uint32_t anchor = (blockIdx.x % blocks) * kThreads + threadIdx.x;
  const ImageObjects objects = objects_of(problem.scratch, image);
  const Box box = load_anchor(problem, anchor);
  const float area = box_area(box);
  const Box bounds = warp_bounds(box, has_size(box));
  uint32_t best_order = 0, owner = 0;
  for_objects(
      problem.scratch, objects, shared,
      [&](const Object& object, uint32_t) {
        return object.kind == ObjectKind::kObject && can_overlap(bounds, object.box);
      },
      [&](const Object& object, uint32_t index) {
        const uint32_t order = iou_order(box_iou(box, area, object.box, object.area));
        if (problem.low_quality != LowQuality::kNone) {
          raise_best(problem.scratch.best, objects.first + index, order, anchor);
        }
        if (order > best_order) {  // objects ascend: on a tie the lower one stays
          best_order = order;
          owner = index;
        }
      });
  if (anchor < problem.num_anchors) {
    const Word64 claim = best_order != 0 ? claim_key(best_order, owner) : 0;
    problem.cls_match[static_cast<int64_t>(image) * problem.num_anchors + anchor] = static_cast<int64_t>(claim);
  }
}

__global__ void __launch_bounds__(kThreads) label_kernel(const __grid_constant__ LaunchedMaxIou problem) {
  MG_OPS_SHARED(StagedObjects, shared);
  const uint32_t blocks = blocks_an_image(problem);
  const uint32_t image = blockIdx.x / blocks;
  const uint32_t anchor = (blockIdx.x % blocks) * kThreads + threadIdx.x;
  const bool exists = anchor < problem.num_anchors;
  const int64_t place = static_cast<int64_t>(image) * problem.num_anchors + anchor;
  if (problem.num_gt == 0) {  // the other kernels did not run
    if (exists) {
      __stcs(problem.cls_match + place, kBackground);
    }
    return;
  }
  const ImageObjects objects = objects_of(problem.scratch, image);
  const Box box = load_anchor(problem, anchor);
  const float area = box_area(box);
  const Box bounds = warp_bounds(box, has_size(box));
  const Word64 claim = exists ? static_cast<Word64>(problem.cls_match[place]) : 0;
  const uint32_t largest_order = __reduce_max_sync(kAllLanes, key_order(claim));
  const int64_t owner = static_cast<int64_t>(key_index(claim));  // of no meaning without a claim
  int64_t label = claim != 0 ? label_by_threshold(problem, key_order(claim), owner) : kBackground;
  bool covered = false;
  for_objects(
      problem.scratch, objects, shared,
      [&](const Object& object, uint32_t index) {
        if (object.kind == ObjectKind::kNone || !can_overlap(bounds, object.box)) {
          return false;
        }
        if (object.kind == ObjectKind::kCrowd) {
          return true;
        }
        const uint32_t best = key_order(problem.scratch.best[objects.first + index]);
        return makes_low_quality_matches(problem, best) && best <= largest_order;
      },
      [&](const Object& object, uint32_t index) {
        if (object.kind == ObjectKind::kCrowd) {
          covered |= positive_ratio(intersection_area(box, object.box), area) >= problem.crowd_overlap;
          return;
        }
        const Word64 best = problem.scratch.best[objects.first + index];
        const bool is_best = problem.low_quality == LowQuality::kTakeFirst
                                 ? key_index(best) == anchor
                                 : iou_order(box_iou(box, area, object.box, object.area)) == key_order(best);
        if (is_best) {  // objects ascend: the later one takes
          label = problem.low_quality == LowQuality::kKeepOwner ? owner : static_cast<int64_t>(index);
        }
      });
  if (exists) {
    __stcs(problem.cls_match + place, label == kBackground && covered ? kIgnored : label);
    if (label >= 0) {
      atomicAdd(problem.num_pos + objects.first + label, 1);
    }
  }
}

// Calls launch(grid, kernel) for each kernel, in order. The grids depend on the sizes alone.
template <typename LaunchKernel>
void launch_max_iou_match(const LaunchedMaxIou& problem, LaunchKernel launch) {
  const int64_t anchor_blocks = problem.batch_size * ((problem.num_anchors + kThreads - 1) / kThreads);
  if (problem.num_gt > 0) {
    launch((problem.num_gt + kThreads - 1) / kThreads, prepare_kernel);
    if (anchor_blocks > 0) {
      launch(anchor_blocks, claim_kernel);
    }
  }
  if (anchor_blocks > 0) {
    launch(anchor_blocks, label_kernel);
  }
}

}  // namespace mg_ops::cuda::rules
