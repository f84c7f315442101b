// SimOTA and dynamic soft label matching of a batch on a GPU in four launches, for any number of anchors and objects.
// No torch in here.
//
//   prepare_kernel    reads the objects, bounds groups of anchors, and empties the claims.
//   candidate_kernel  a thread an anchor: whether it is a candidate; then half a warp its sum over the classes.
//   select_kernel     a block an object: how many anchors it selects, and the cheapest ones, which it claims.
//   label_kernel      a thread an anchor: its label and soft target. One that several objects have claimed looks at
//   all.
//
// Every result is a maximum or a sum of integers, so the order in which blocks run does not matter.
#pragma once

#include "../dynamic_k.h"
#include "ranked.cuh"

namespace mg_ops::cuda::rules::dynamic_k {

// The match holds the claims between the launches: how many objects have selected an anchor, in the upper half, and the
// sum of their indices.
struct LaunchedDynamicK : DynamicKProblem {
  RankedScratch scratch;
  float* widest;            // (A / 32) the widest anchor of each group
  float* sums;              // (B, A) over the classes; below 0: no candidate
  Box* predicted;           // (B, A / 32) the box around the predicted boxes of each group's candidates
  int32_t* num_candidates;  // (B,)
};

constexpr float kNoCandidate = -1.0f;

// As max_iou_match_kernels.cuh's: 40 bytes an object, 5 an image and anchor, and a little.
inline size_t place_scratch(LaunchedDynamicK& problem, char* memory) {
  Placing placing{memory};
  if (problem.num_gt == 0) {
    return 0;
  }
  const int64_t num_groups = (problem.num_anchors + 31) / 32;
  place_ranked(placing, problem.scratch, problem);
  placing.place(problem.widest, num_groups);
  placing.place(problem.sums, problem.batch_size * problem.num_anchors);
  placing.place(problem.predicted, problem.batch_size * num_groups);
  placing.place(problem.num_candidates, problem.batch_size);
  return placing.bytes;
}

MG_OPS_DEVICE int64_t place_of(const MatchProblem& problem, uint32_t image, uint32_t anchor) {
  return static_cast<int64_t>(image) * problem.num_anchors + anchor;
}

MG_OPS_DEVICE Word64* claim_of(const MatchProblem& problem, uint32_t image, uint32_t anchor) {
  return reinterpret_cast<Word64*>(problem.cls_match + place_of(problem, image, anchor));
}

// What the kernels read of an anchor.
struct Candidate {
  Point point;  // kNowhere: it has no size, or is not finite
  float width;
  Box box;  // the predicted one
  float area;
};

MG_OPS_DEVICE Candidate load_center(const MatchProblem& problem, uint32_t anchor) {
  const Box box = anchor < problem.num_anchors ? finite_or_empty(load_row(problem.anchors, 0, anchor)) : Box{};
  return {has_size(box) ? box_center(box) : kNowhere, box.x2 - box.x1, {}, 0.0f};
}

MG_OPS_DEVICE Candidate load_candidate(const MatchProblem& problem, uint32_t image, uint32_t anchor) {
  Candidate candidate = load_center(problem, anchor);
  const Box anchor_box = problem.decode ? finite_or_empty(load_row(problem.anchors, 0, anchor)) : Box{};
  candidate.box = load_pred(problem, image, anchor, anchor_box);
  candidate.area = box_area(candidate.box);
  return candidate;
}

// A score of a class, as float32.
MG_OPS_DEVICE float load_score(const MatchProblem& problem, uint32_t image, uint32_t anchor, int64_t label) {
  const FloatInput& scores = problem.cls_scores;
  return label < 0 ? kNoScore
                   : load_float(scores, image * scores.image_stride + anchor * scores.row_stride +
                                            label * scores.column_stride);
}

MG_OPS_DEVICE float widest_of_warp(float width, bool counts) {
  return bits_float(__reduce_max_sync(kAllLanes, counts ? float_bits(width) : 0));
}

// The order of a pair's cost if it is at least `floor`, else 0.
MG_OPS_DEVICE uint32_t pair_order(const DynamicKProblem& problem, uint32_t image, uint32_t anchor,
                                  const Candidate& candidate, float sum, const Object& object, uint32_t floor) {
  const float iou = box_iou(candidate.box, candidate.area, object.box, object.area);
  const float of_iou = iou_cost(iou, problem.epsilon, problem.iou_weight);
  const float of_place =
      place_cost(candidate.point, candidate.width, object.box, problem.rule, problem.center_radius, problem.penalty);
  // No class cost is below 0, and rounding keeps order.
  if (cost_order(of_iou + of_place) < floor) {
    return 0;
  }
  const float of_class = class_cost(sum, load_score(problem, image, anchor, object.label), iou,
                                    problem.scores_are_probabilities, problem.rule == DynamicKRule::kSoftLabel);
  return cost_order((of_class * problem.cls_weight + of_iou) + of_place);
}

__global__ void __launch_bounds__(kThreads, 4) prepare_kernel(const __grid_constant__ LaunchedDynamicK problem) {
  prepare_objects(problem, problem.scratch);
  prepare_groups(problem, problem.scratch);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t group = index / 32;  // the block's groups are those of prepare_groups
  if (group < count_groups(problem)) {
    const Candidate center = load_center(problem, static_cast<uint32_t>(index));
    const float widest = widest_of_warp(center.width, is_somewhere(center.point));
    if (lane_index() == 0) {
      problem.widest[group] = widest;
    }
  }
  if (index < problem.batch_size) {
    problem.num_candidates[index] = 0;
  }
  if (index < problem.batch_size * problem.num_anchors) {
    problem.cls_match[index] = 0;
  }
}

// The sum over the classes of the anchors of a warp's lanes that are marked: half a warp an anchor, in the order of the
// definition. Every lane must call it.
MG_OPS_DEVICE float sum_over_classes(const DynamicKProblem& problem, uint32_t image, uint32_t anchor, bool marked) {
  const bool is_soft = problem.rule == DynamicKRule::kSoftLabel;
  const uint32_t first_anchor = anchor - static_cast<uint32_t>(lane_index());
  const int half = lane_index() / 16;
  float result = kNoCandidate;
  for (uint32_t left = __ballot_sync(kAllLanes, marked); left != 0;) {
    const int first = __ffs(static_cast<int>(left)) - 1;
    left &= left - 1;
    const int second = left != 0 ? __ffs(static_cast<int>(left)) - 1 : first;
    left &= left - 1;  // of 0 it leaves 0
    const uint32_t own = first_anchor + static_cast<uint32_t>(half == 0 ? first : second);
    float sum = 0.0f;
    for (int64_t label = lane_index() % 16; label < problem.num_classes; label += kSumLanes) {
      sum += loss_if_other(load_score(problem, image, own, label), problem.scores_are_probabilities, is_soft);
    }
    sum = add_lanes(sum);
    const float of_first = __shfl_sync(kAllLanes, sum, 0), of_second = __shfl_sync(kAllLanes, sum, 16);
    result = lane_index() == first ? of_first : lane_index() == second ? of_second : result;
  }
  return result;
}

__global__ void __launch_bounds__(kThreads, 4) candidate_kernel(const __grid_constant__ LaunchedDynamicK problem) {
  MG_OPS_SHARED(StagedObjects, shared);
  const uint32_t blocks = blocks_an_image(problem);
  const uint32_t image = blockIdx.x / blocks;
  const uint32_t anchor = (blockIdx.x % blocks) * kThreads + threadIdx.x;
  const Candidate center = load_center(problem, anchor);
  const bool somewhere = is_somewhere(center.point);
  const CenterBounds bounds = {warp_bounds({center.point.x, center.point.y, center.point.x, center.point.y}, somewhere),
                               widest_of_warp(center.width, somewhere)};
  bool near = false;
  for_objects(
      problem.scratch, objects_of(problem.scratch, image), shared,
      [&](const Object& object, uint32_t) {
        return object.kind == ObjectKind::kObject &&
               can_be_near(bounds, object.box, problem.rule, problem.center_radius);
      },
      [&](const Object& object, uint32_t) {
        near |= is_near(center.point, center.width, object.box, problem.rule, problem.center_radius);
      });
  near &= somewhere;  // what is nowhere is inside of a square without end
  const float sum = sum_over_classes(problem, image, anchor, near);
  const Box box = near ? load_candidate(problem, image, anchor).box : Box{};
  const Box predicted = warp_bounds(box, near && has_size(box));
  const uint32_t num_near = static_cast<uint32_t>(__popc(__ballot_sync(kAllLanes, near)));
  if (anchor < problem.num_anchors) {
    problem.sums[place_of(problem, image, anchor)] = sum;
    if (lane_index() == 0) {
      problem.predicted[static_cast<int64_t>(image) * count_groups(problem) + anchor / 32] = predicted;
      atomicAdd(problem.num_candidates + image, static_cast<int32_t>(num_near));
    }
  }
}

struct SelectShared {
  SelectedShared best;
  Word64 found[kMaxK];  // by rank
};

__global__ void __launch_bounds__(kThreads, 4) select_kernel(const __grid_constant__ LaunchedDynamicK problem) {
  MG_OPS_SHARED(SelectShared, shared);
  const Object object = problem.scratch.objects[blockIdx.x];
  const uint32_t image = image_of(problem, problem.scratch, blockIdx.x);
  if (object.kind != ObjectKind::kObject || image == problem.batch_size || problem.num_candidates[image] == 0) {
    return;
  }
  const uint32_t index = blockIdx.x - static_cast<uint32_t>(problem.scratch.image_starts[image]);
  const float* sums = problem.sums + static_cast<int64_t>(image) * problem.num_anchors;
  const Box* predicted = problem.predicted + static_cast<int64_t>(image) * count_groups(problem);
  const auto overlaps = [&](uint32_t group) { return can_overlap(predicted[group], object.box); };
  const auto keep = [&](Word64 key, uint32_t rank) { shared.found[rank] = key; };

  // How many it selects.
  const auto iou_key = [&](uint32_t anchor, Word64) -> Word64 {
    if (sums[anchor] < 0.0f) {
      return 0;
    }
    const Candidate candidate = load_candidate(problem, image, anchor);
    const float iou = box_iou(candidate.box, candidate.area, object.box, object.area);
    return iou > 0.0f ? claim_key(iou_order(iou), anchor) : 0;
  };
  const uint32_t num_ious =
      for_best_of_groups(problem, static_cast<uint32_t>(problem.k), shared.best, overlaps, iou_key, keep);
  __syncthreads();
  float total = 0.0f;
  for (uint32_t i = 0; i < num_ious; ++i) {
    total += bits_float(key_order(shared.found[i]));
  }
  const uint32_t count = static_cast<uint32_t>(count_to_select(total, problem.num_candidates[image]));

  // The cheapest ones: first of the groups where one may cost no penalty, or have an IoU. If all found are cheaper than
  // any other can be, they are it.
  const auto cost_key = [&](uint32_t anchor, Word64 floor) -> Word64 {
    if (sums[anchor] < 0.0f) {
      return 0;
    }
    const uint32_t order = pair_order(problem, image, anchor, load_candidate(problem, image, anchor), sums[anchor],
                                      object, key_order(floor));
    return order != 0 ? claim_key(order, anchor) : 0;
  };
  const auto is_promising = [&](uint32_t group) {
    const CenterBounds bounds = {problem.scratch.groups[group], problem.widest[group]};
    return overlaps(group) || can_be_cheap(bounds, object.box, problem.rule, problem.center_radius);
  };
  const uint32_t num_found = for_best_of_groups(problem, count, shared.best, is_promising, cost_key, keep);
  __syncthreads();
  if (num_found < count || key_order(shared.found[count - 1]) <= order_without_iou(problem, false)) {
    for_best_of_groups(problem, count, shared.best, [](uint32_t) { return true; }, cost_key, keep);
    __syncthreads();
  }
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    atomicAdd(claim_of(problem, image, key_index(shared.found[i])), (Word64{1} << 32) + index);
  }
}

__global__ void __launch_bounds__(kThreads, 4) label_kernel(const __grid_constant__ LaunchedDynamicK problem) {
  MG_OPS_SHARED(StagedObjects, shared);
  const uint32_t blocks = blocks_an_image(problem);
  const uint32_t image = blockIdx.x / blocks;
  const uint32_t anchor = (blockIdx.x % blocks) * kThreads + threadIdx.x;
  const bool exists = anchor < problem.num_anchors;
  if (problem.num_gt == 0) {  // the other kernels did not run
    if (exists) {
      __stcs(problem.cls_match + place_of(problem, image, anchor), kBackground);
      problem.soft_targets[place_of(problem, image, anchor)] = 0.0f;
    }
    return;
  }
  const ImageObjects objects = objects_of(problem.scratch, image);
  const Word64 claim = exists ? *claim_of(problem, image, anchor) : 0;
  const bool contested = (claim >> 32) > 1;
  const Candidate candidate = claim != 0 ? load_candidate(problem, image, anchor) : Candidate{};
  const float sum = claim != 0 ? problem.sums[place_of(problem, image, anchor)] : 0.0f;
  const bool some_contested = __ballot_sync(kAllLanes, contested) != 0;
  const Box predicted = warp_bounds(candidate.box, contested && has_size(candidate.box));
  const Box box = exists ? finite_or_empty(load_row(problem.anchors, 0, anchor)) : Box{};
  const float area = box_area(box);
  const Box boxes = warp_bounds(box, has_size(box));
  Word64 best = 0;  // claim_key(cost_order, object)
  bool covered = false;
  const auto look_at = [&](const Object& object, uint32_t index) {
    const uint32_t order = contested ? pair_order(problem, image, anchor, candidate, sum, object, key_order(best)) : 0;
    const Word64 key = order != 0 ? claim_key(order, index) : 0;
    best = key > best ? key : best;
  };
  const bool has_work = contested || (problem.gt_crowd != nullptr && exists);
  const bool block_has_work = __syncthreads_or(has_work ? 1 : 0) != 0;
  for_objects(
      problem.scratch, block_has_work ? objects : ImageObjects{objects.first, 0}, shared,
      [&](const Object& object, uint32_t) {
        return object.kind == ObjectKind::kCrowd
                   ? can_overlap(boxes, object.box)
                   : object.kind == ObjectKind::kObject && some_contested && can_overlap(predicted, object.box);
      },
      [&](const Object& object, uint32_t index) {
        if (object.kind == ObjectKind::kCrowd) {
          covered |= positive_ratio(intersection_area(box, object.box), area) >= problem.crowd_overlap;
        } else {
          look_at(object, index);
        }
      });
  // The others have no IoU with it.
  const bool in_doubt = contested && key_order(best) <= order_without_iou(problem, true);
  const bool some_in_doubt = __ballot_sync(kAllLanes, in_doubt) != 0;
  const bool block_in_doubt = __syncthreads_or(in_doubt ? 1 : 0) != 0;
  for_objects(
      problem.scratch, block_in_doubt ? objects : ImageObjects{objects.first, 0}, shared,
      [&](const Object& object, uint32_t) {
        return object.kind == ObjectKind::kObject && some_in_doubt && !can_overlap(predicted, object.box);
      },
      look_at);
  if (!exists) {
    return;
  }
  int64_t label = covered ? kIgnored : kBackground;
  float target = 0.0f;
  if (claim != 0) {
    const uint32_t owner = contested ? key_index(best) : static_cast<uint32_t>(claim);
    const Object& object = problem.scratch.objects[objects.first + owner];
    label = static_cast<int64_t>(owner);
    target = box_iou(candidate.box, candidate.area, object.box, object.area);
    atomicAdd(problem.num_pos + objects.first + owner, 1);
  }
  __stcs(problem.cls_match + place_of(problem, image, anchor), label);
  problem.soft_targets[place_of(problem, image, anchor)] = target;
}

// Calls launch(grid, kernel) for each kernel, in order. The grids depend on the sizes alone.
template <typename LaunchKernel>
void launch_dynamic_k_match(const LaunchedDynamicK& problem, LaunchKernel launch) {
  const int64_t num_places = problem.batch_size * problem.num_anchors;
  const int64_t anchor_blocks = problem.batch_size * ((problem.num_anchors + kThreads - 1) / kThreads);
  if (problem.num_gt > 0) {
    const int64_t most = problem.num_gt > num_places ? problem.num_gt : num_places;
    launch((most + kThreads - 1) / kThreads, prepare_kernel);
    if (num_places > 0) {
      launch(anchor_blocks, candidate_kernel);
      launch(problem.num_gt, select_kernel);
    }
  }
  if (num_places > 0) {
    launch(anchor_blocks, label_kernel);
  }
}

}  // namespace mg_ops::cuda::rules::dynamic_k
