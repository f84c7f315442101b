// The box losses on a GPU: a thread an anchor, of the distribution focal loss a side of it, or a logit. No torch in
// here.
#pragma once

#include "../box_loss.h"
#include "block_sum.cuh"

namespace mg_ops::cuda {

template <class Problem>
struct Launched : Problem {
  int64_t blocks_per_image;
  double* block_sums;  // (batch_size * blocks_per_image,)
  const float* grad_output;
  void* gradient;  // of the predictions' shape, contiguous, in their type
};

// With so many threads an image.
template <class Problem>
Launched<Problem> launched(const Problem& problem, int64_t threads) {
  Launched<Problem> result{};
  static_cast<Problem&>(result) = problem;
  result.blocks_per_image = (threads + kLossThreads - 1) / kLossThreads;
  return result;
}

using LaunchedBoxLoss = Launched<BoxLossProblem>;
using LaunchedDistributionLoss = Launched<DistributionLossProblem>;

// Whether an anchor is a positive, and then its weight and the box of its object.
MG_OPS_DEVICE bool load_positive(const PositivesProblem& problem, int64_t image, int64_t anchor, float& weight,
                                 Box& gt_box) {
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
  weight =
      weights.data == nullptr ? 1.0f : load_float(weights, image * weights.image_stride + anchor * weights.row_stride);
  gt_box = load_row(problem.gt_boxes, 0, start + object);
  return true;
}

// Whether this thread's anchor is a positive, and then its weighted loss and slopes.
MG_OPS_DEVICE bool load_loss(const LaunchedBoxLoss& problem, int64_t image, int64_t anchor, LossAndSlopes& positive) {
  float weight;
  Box gt_box;
  if (anchor >= problem.num_anchors || !load_positive(problem, image, anchor, weight, gt_box)) {
    return false;
  }
  positive =
      box_loss_of(problem, load_row(problem.anchors, 0, anchor), load_row(problem.predictions, image, anchor), gt_box);
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
  const bool counts = load_loss(problem, image, anchor, positive);
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
  const bool counts = load_loss(problem, image, anchor, positive);
  if (anchor < problem.num_anchors) {
    const float scale = __ldg(problem.grad_output);
    float slopes[4];
    for (int i = 0; i < 4; ++i) {
      slopes[i] = counts ? scale * positive.slopes[i] : 0.0f;
    }
    store_numbers(problem.predictions.type, problem.gradient, 4 * (image * problem.num_anchors + anchor), 4, slopes);
  }
}

// Reads the logits of a side by the bin.
struct SideLogits {
  const FloatInput& logits;
  int64_t first;

  __device__ __forceinline__ float operator()(int64_t bin) const {
    return load_float(logits, first + bin * logits.column_stride);
  }
};

MG_OPS_DEVICE SideLogits side_logits(const DistributionLossProblem& problem, int64_t image, int64_t anchor,
                                     int64_t side) {
  const FloatInput& logits = problem.predictions;
  return {logits,
          image * logits.image_stride + anchor * logits.row_stride + side * problem.num_bins * logits.column_stride};
}

MG_OPS_DEVICE Bins load_bins(const DistributionLossProblem& problem, int64_t anchor, int64_t side, const Box& gt_box) {
  const float stride = load_float(problem.strides, anchor * problem.strides.row_stride);
  return bins_of(problem, load_row(problem.anchors, 0, anchor), gt_box, stride, side);
}

static __global__ void __launch_bounds__(kLossThreads)
    distribution_loss_kernel(const __grid_constant__ LaunchedDistributionLoss problem) {
  MG_OPS_SHARED(SumShared, shared);
  const int64_t image = blockIdx.x / problem.blocks_per_image;
  const int64_t index = (blockIdx.x - image * problem.blocks_per_image) * kLossThreads + threadIdx.x;
  const int64_t anchor = index / 4;
  float weight, loss = 0.0f;
  Box gt_box;
  if (anchor < problem.num_anchors && load_positive(problem, image, anchor, weight, gt_box)) {
    const Bins bins = load_bins(problem, anchor, index % 4, gt_box);
    const SideLogits logits = side_logits(problem, image, anchor, index % 4);
    loss = weight * distribution_loss_of(bins, softmax_of(problem.num_bins, logits), logits);
  }
  const double total = block_sum(static_cast<double>(loss), shared);
  if (threadIdx.x == 0) {
    problem.block_sums[blockIdx.x] = total;
  }
}

// Neighbors write neighbors. Few of them are a positive's: that each of these goes over all bins costs next to nothing.
static __global__ void __launch_bounds__(kLossThreads)
    distribution_loss_backward_kernel(const __grid_constant__ LaunchedDistributionLoss problem) {
  const int64_t image = blockIdx.x / problem.blocks_per_image;
  const int64_t index = (blockIdx.x - image * problem.blocks_per_image) * kLossThreads + threadIdx.x;
  // In 32 bits, which the launch has made sure of: a division of 64 takes many times as long.
  const uint32_t row = static_cast<uint32_t>(index) / static_cast<uint32_t>(problem.num_bins);
  const int64_t anchor = row / 4, bin = index - int64_t{row} * problem.num_bins;
  if (anchor >= problem.num_anchors) {
    return;
  }
  float weight, slope = 0.0f;
  Box gt_box;
  if (load_positive(problem, image, anchor, weight, gt_box)) {
    const Bins bins = load_bins(problem, anchor, row % 4, gt_box);
    const SideLogits logits = side_logits(problem, image, anchor, row % 4);
    const Softmax softmax = softmax_of(problem.num_bins, logits);
    slope = __ldg(problem.grad_output) * weight * distribution_slope_of(bins, softmax, bin, logits(bin));
  }
  store_numbers(problem.predictions.type, problem.gradient, 4 * image * problem.num_anchors * problem.num_bins + index,
                1, &slope);
}

}  // namespace mg_ops::cuda
