// The classification losses on a GPU: one pass over the logits, a few thousand of them a block. No torch in here.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../class_loss.h"
#include "block_sum.cuh"

namespace mg_ops::cuda {

constexpr int kLogitsAtOnce = 4;  // neighbors, by one load where they are aligned
constexpr int kLoadsAThread = 4;
constexpr int kLogitsABlock = kLossThreads * kLogitsAtOnce * kLoadsAThread;

struct LaunchedClassLoss : ClassLossProblem {
  int64_t blocks_per_image;
  bool whole_quads;    // any four logits from a multiple of four on are of one anchor, neighbors, and aligned
  double* block_sums;  // (batch_size * blocks_per_image,)
  const float* grad_output;
  void* gradient;  // (B, A, C) contiguous, in the type of the logits
};

inline LaunchedClassLoss launched(const ClassLossProblem& problem) {
  LaunchedClassLoss result{};
  static_cast<ClassLossProblem&>(result) = problem;
  const int64_t in_image = problem.num_anchors * problem.num_classes;
  result.blocks_per_image = (in_image + kLogitsABlock - 1) / kLogitsABlock;
  const FloatInput& logits = problem.logits;
  const int64_t load_bytes = logits.type == FloatType::kFloat64 ? 16 : 4 * bytes_of(logits.type);
  result.whole_quads = problem.num_classes % 4 == 0 && logits.column_stride == 1 && logits.row_stride % 4 == 0 &&
                       logits.image_stride % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(logits.data) % static_cast<uintptr_t>(load_bytes) == 0;
  return result;
}

// Where a logit of an image is.
struct LogitPlace {
  int64_t anchor;
  uint32_t label;
};

// Of the logit number `block_start + offset` of an image.
MG_OPS_DEVICE LogitPlace place_of(const LaunchedClassLoss& problem, int64_t first_anchor, uint32_t first_label,
                                  uint32_t offset) {
  const uint32_t num_classes = static_cast<uint32_t>(problem.num_classes);
  const uint32_t label = first_label + offset;
  return {first_anchor + label / num_classes, label % num_classes};
}

// What an anchor asks of its classes.
struct AnchorTarget {
  bool counts;    // it is not ignored
  int64_t label;  // -1: background
  float target;
};

MG_OPS_DEVICE AnchorTarget load_target(const LaunchedClassLoss& problem, int64_t image, int64_t anchor) {
  const int64_t label =
      __ldg(problem.class_targets + image * problem.target_image_stride + anchor * problem.target_stride);
  if (label < 0 || label >= problem.num_classes) {
    return {label == kBackground, kBackground, 0.0f};
  }
  const FloatInput& targets = problem.soft_targets;
  const float target =
      targets.data == nullptr ? 1.0f : load_float(targets, image * targets.image_stride + anchor * targets.row_stride);
  return {true, target == 0.0f ? kBackground : label, target};
}

// Calls at_logits(index in the image, count, logits, place) for all logits of this block that this thread looks at: up
// to four neighbors of one anchor at once.
template <class Function>
MG_OPS_DEVICE void for_logits(const LaunchedClassLoss& problem, int64_t image, int64_t block, Function at_logits) {
  const int64_t in_image = problem.num_anchors * problem.num_classes;
  const int64_t block_start = block * kLogitsABlock;
  const int64_t first_anchor = block_start / problem.num_classes;
  const uint32_t first_label = static_cast<uint32_t>(block_start - first_anchor * problem.num_classes);
#pragma unroll
  for (int load = 0; load < kLoadsAThread; ++load) {
    if (problem.whole_quads) {
      const uint32_t offset = (load * kLossThreads + threadIdx.x) * kLogitsAtOnce;
      if (block_start + offset < in_image) {
        const LogitPlace place = place_of(problem, first_anchor, first_label, offset);
        const Box four = load_four(problem.logits, image * problem.logits.image_stride +
                                                       place.anchor * problem.logits.row_stride + place.label);
        const float logits[kLogitsAtOnce] = {four.x1, four.y1, four.x2, four.y2};
        at_logits(block_start + offset, kLogitsAtOnce, logits, place);
      }
    } else {
      for (int i = 0; i < kLogitsAtOnce; ++i) {
        const uint32_t offset = (load * kLogitsAtOnce + i) * kLossThreads + threadIdx.x;
        if (block_start + offset < in_image) {
          const LogitPlace place = place_of(problem, first_anchor, first_label, offset);
          const FloatInput& input = problem.logits;
          const float logit = load_float(
              input, image * input.image_stride + place.anchor * input.row_stride + place.label * input.column_stride);
          at_logits(block_start + offset, 1, &logit, place);
        }
      }
    }
  }
}

template <Exponent exponent>
__global__ void __launch_bounds__(kLossThreads) class_loss_kernel(const __grid_constant__ LaunchedClassLoss problem) {
  MG_OPS_SHARED(SumShared, shared);
  const int64_t image = blockIdx.x / problem.blocks_per_image;
  const int64_t block = blockIdx.x - image * problem.blocks_per_image;
  float negatives = 0.0f, at_labels = 0.0f;
  for_logits(problem, image, block, [&](int64_t, int count, const float* logits, LogitPlace place) {
    const AnchorTarget anchor = load_target(problem, image, place.anchor);
    if (!anchor.counts) {
      return;
    }
    const int64_t at = anchor.label - place.label;  // which of them is the label
#pragma unroll
    for (int i = 0; i < kLogitsAtOnce; ++i) {
      if (i < count && i != at) {
        negatives += negative_loss<exponent>(logits[i], problem.params.negative_gamma);
      } else if (i < count) {
        at_labels += positive_loss(logits[i], anchor.target, problem.params).loss;
      }
    }
  });
  const double sum = static_cast<double>(at_labels) + static_cast<double>(problem.params.negative_weight) * negatives;
  const double total = block_sum(sum, shared);
  if (threadIdx.x == 0) {
    problem.block_sums[blockIdx.x] = total;
  }
}

template <Exponent exponent>
__global__ void __launch_bounds__(kLossThreads)
    class_loss_backward_kernel(const __grid_constant__ LaunchedClassLoss problem) {
  const int64_t image = blockIdx.x / problem.blocks_per_image;
  const int64_t block = blockIdx.x - image * problem.blocks_per_image;
  const float scale = __ldg(problem.grad_output);
  const float negative_scale = scale * problem.params.negative_weight;
  const int64_t image_start = image * problem.num_anchors * problem.num_classes;
  for_logits(problem, image, block, [&](int64_t index, int count, const float* logits, LogitPlace place) {
    const AnchorTarget anchor = load_target(problem, image, place.anchor);
    const int64_t at = anchor.label - place.label;
    float gradients[kLogitsAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kLogitsAtOnce; ++i) {
      if (i < count && anchor.counts) {
        gradients[i] = i == at ? scale * positive_loss(logits[i], anchor.target, problem.params).gradient
                               : negative_scale * negative_gradient<exponent>(logits[i], problem.params.negative_gamma);
      }
    }
    store_numbers(problem.logits.type, problem.gradient, image_start + index, count, gradients);
  });
}

// Calls f with the exponent as a constant.
template <class Function>
void with_exponent(float gamma, Function f) {
  switch (exponent_of(gamma)) {
    case Exponent::kZero: return f(std::integral_constant<Exponent, Exponent::kZero>());
    case Exponent::kOne: return f(std::integral_constant<Exponent, Exponent::kOne>());
    case Exponent::kTwo: return f(std::integral_constant<Exponent, Exponent::kTwo>());
    default: return f(std::integral_constant<Exponent, Exponent::kAny>());
  }
}

}  // namespace mg_ops::cuda
