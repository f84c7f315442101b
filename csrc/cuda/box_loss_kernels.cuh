// The box losses on a GPU: a thread an anchor. No torch in here.
#pragma once

#include "../box_loss.h"
#include "block_sum.cuh"

namespace mg_ops::cuda {

struct LaunchedBoxLoss : BoxLossProblem {
  int64_t blocks_per_image;
  double* block_sums;  // (batch_size * blocks_per_image,)
  const float* grad_output;
  void* gradient;  // (B, A, 4) contiguous, in the type of the predictions
};

inline LaunchedBoxLoss launched(const BoxLossProblem& problem) {
  LaunchedBoxLoss result{};
  static_cast<BoxLossProblem&>(result) = problem;
  result.blocks_per_image = (problem.num_anchors + kLossThreads - 1) / kLossThreads;
  return result;
}

// Whether this thread's anchor is a positive, and then its weighted loss and slopes.
MG_OPS_DEVICE bool load_positive(const LaunchedBoxLoss& problem, int64_t image, int64_t anchor,
                                 LossAndSlopes& positive) {
  if (anchor >= problem.num_anchors) {
    return false;
  }
  const int64_t object = __ldg(problem.match + image * problem.match_image_stride + anchor * problem.match_stride);
  if (object < 0) {
    return false;
  }
  const int64_t offset = load_integer(problem.gt_offsets, image);
  const int64_t start = offset < 0 ? 0 : offset > problem.num_gt ? problem.num_gt : offset;
  if (object >= problem.num_gt - start) {
    return false;
  }
  const FloatInput& weights = problem.weights;
  const float weight =
      weights.data == nullptr ? 1.0f : load_float(weights, image * weights.image_stride + anchor * weights.row_stride);
  positive = box_loss_of(problem, load_row(problem.anchors, 0, anchor), load_row(problem.predictions, image, anchor),
                         load_row(problem.gt_boxes, 0, start + object));
  positive.loss *= weight;
  for (int i = 0; i < 4; ++i) {
    positive.slopes[i] *= weight;
  }
  return true;
}

static __global__ void __launch_bounds__(kLossThreads)
    box_loss_kernel(const __grid_constant__ LaunchedBoxLoss problem) {
  MG_OPS_SHARED(SumShared, shared);
  const int64_t image = blockIdx.x / problem.blocks_per_image;
  const int64_t anchor = (blockIdx.x - image * problem.blocks_per_image) * kLossThreads + threadIdx.x;
  LossAndSlopes positive{};
  const bool counts = load_positive(problem, image, anchor, positive);
  const double total = block_sum(counts ? static_cast<double>(positive.loss) : 0.0, shared);
  if (threadIdx.x == 0) {
    problem.block_sums[blockIdx.x] = total;
  }
}

static __global__ void __launch_bounds__(kLossThreads)
    box_loss_backward_kernel(const __grid_constant__ LaunchedBoxLoss problem) {
  const int64_t image = blockIdx.x / problem.blocks_per_image;
  const int64_t anchor = (blockIdx.x - image * problem.blocks_per_image) * kLossThreads + threadIdx.x;
  LossAndSlopes positive{};
  const bool counts = load_positive(problem, image, anchor, positive);
  if (anchor < problem.num_anchors) {
    const float scale = __ldg(problem.grad_output);
    float slopes[4];
    for (int i = 0; i < 4; ++i) {
      slopes[i] = counts ? scale * positive.slopes[i] : 0.0f;
    }
    store_numbers(problem.predictions.type, problem.gradient, 4 * (image * problem.num_anchors + anchor), 4, slopes);
  }
}

}  // namespace mg_ops::cuda
