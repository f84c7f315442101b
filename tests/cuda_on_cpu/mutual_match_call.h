// A call of mutual matching as Python hands it to the emulators (tests/cuda_on_cpu/__init__.py mirrors EmulatedCall),
// and the problem it makes for the kernels.
#pragma once

#include "../../csrc/cuda/mutual_match_kernels.cuh"

#include <cstdlib>
#include <memory>
#include <new>

struct StridedArray {
  const void* data;
  int64_t strides[3];  // in elements, outermost first; anchors and objects have an image stride of 0
  int32_t type;        // FloatType; of integers: 1 for int64, 0 for int32
  int32_t whole_rows;
};

struct EmulatedCall {
  StridedArray anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd;
  int64_t batch_size, num_anchors, num_classes, num_gt;
  int32_t decode;
  float weight_x, weight_y, weight_w, weight_h, clip;
  int32_t scores_are_probabilities, classification_by_regressed, localization_by_amplified;
  float sigma, iou_positive, iou_ignored, crowd_overlap;
  int64_t *cls_match, *loc_match;
  int32_t *num_pos, *num_total;
  uint64_t seed;
  int64_t scores_read, scratch_bytes, launches;  // results
};

inline mg_ops::FloatInput float_input(const StridedArray& array) {
  return {array.data,
          array.strides[0],
          array.strides[1],
          array.strides[2],
          static_cast<mg_ops::FloatType>(array.type),
          array.whole_rows != 0};
}

inline mg_ops::IntegerInput integer_input(const StridedArray& array) {
  return {array.data, array.strides[0], array.type != 0};
}

using Scratch = std::unique_ptr<void, void (*)(void*)>;

// Fills the problem, and allocates its scratch, which holds garbage: what new_empty returns is anything.
inline Scratch make_problem(EmulatedCall& call, mg_ops::cuda::LaunchedProblem& problem) {
  problem.anchors = float_input(call.anchors);
  problem.pred_boxes = float_input(call.pred_boxes);
  problem.cls_scores = float_input(call.cls_scores);
  problem.gt_boxes = float_input(call.gt_boxes);
  problem.gt_labels = integer_input(call.gt_labels);
  problem.gt_offsets = integer_input(call.gt_offsets);
  problem.gt_crowd = static_cast<const uint8_t*>(call.gt_crowd.data);
  problem.crowd_stride = call.gt_crowd.strides[0];
  problem.batch_size = call.batch_size;
  problem.num_anchors = call.num_anchors;
  problem.num_classes = call.num_classes;
  problem.num_gt = call.num_gt;
  problem.decode = call.decode != 0;
  problem.scores_are_probabilities = call.scores_are_probabilities != 0;
  problem.coder = {call.weight_x, call.weight_y, call.weight_w, call.weight_h, call.clip};
  problem.params = {call.classification_by_regressed != 0,
                    call.localization_by_amplified != 0,
                    call.sigma,
                    call.iou_positive,
                    call.iou_ignored,
                    call.crowd_overlap};
  problem.cls_match = call.cls_match;
  problem.loc_match = call.loc_match;
  problem.num_pos = call.num_pos;
  problem.num_total = call.num_total;

  const size_t bytes = mg_ops::cuda::place_scratch(problem, nullptr);
  void* memory = nullptr;
  if (posix_memalign(&memory, 32, bytes == 0 ? 32 : bytes) != 0) {
    throw std::bad_alloc();
  }
  std::memset(memory, 0xa5, bytes);
  mg_ops::cuda::place_scratch(problem, static_cast<char*>(memory));
  call.scratch_bytes = static_cast<int64_t>(bytes);
  return Scratch(memory, std::free);
}
