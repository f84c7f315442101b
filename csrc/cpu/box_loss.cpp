// mg_ops::box_loss, mg_ops::distribution_loss and their backwards on the CPU. Positives are few: the time goes to
// looking for them and to writing the zeros of all others, so one version serves every instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <memory>

#define MG_OPS_CPU_TARGET baseline
#include "../box_loss_op.h"
#include "float_types.h"
#include "offsets.h"
#include "threads.h"

namespace mg_ops {
namespace {

using baseline::load_float;

// Chunks of an image, whatever the number of threads, so that sums are the same on every machine.
constexpr int64_t kChunkAnchors = 4096;

int64_t chunks_per_image(const PositivesProblem& problem) {
  return (problem.num_anchors + kChunkAnchors - 1) / kChunkAnchors;
}

Box load_row(const FloatInput& input, int64_t image, int64_t row) {
  const int64_t first = image * input.image_stride + row * input.row_stride, step = input.column_stride;
  return {load_float(input, first), load_float(input, first + step), load_float(input, first + 2 * step),
          load_float(input, first + 3 * step)};
}

// Calls at_positive(image, anchor, weight, box of the object) for each positive of a chunk.
template <class Function>
void for_positives(const PositivesProblem& problem, int64_t chunk, Function at_positive) {
  const int64_t image = chunk / chunks_per_image(problem);
  const int64_t first = chunk % chunks_per_image(problem) * kChunkAnchors;
  const int64_t last = first + kChunkAnchors < problem.num_anchors ? first + kChunkAnchors : problem.num_anchors;
  const int64_t image_start = load_integer(problem.gt_offsets, image);
  const int64_t* const match = problem.match + image * problem.match_image_stride;
  for (int64_t anchor = first; anchor < last; ++anchor) {
    const int64_t object = match[anchor * problem.match_stride];
    if (object < 0 || object >= problem.num_gt - image_start) {
      continue;
    }
    const FloatInput& weights = problem.weights;
    const float weight = weights.data == nullptr
                             ? 1.0f
                             : load_float(weights, image * weights.image_stride + anchor * weights.row_stride);
    at_positive(image, anchor, weight, load_row(problem.gt_boxes, 0, image_start + object));
  }
}

// The sum of loss_of(image, anchor, box of the object), weighted, over all positives.
template <class Function>
void sum_positives(const PositivesProblem& problem, float* loss, Function loss_of) {
  check_offsets(problem.gt_offsets, problem.batch_size, problem.num_gt);
  const int64_t num_chunks = problem.batch_size * chunks_per_image(problem);
  const std::unique_ptr<double[]> sums(new double[static_cast<size_t>(num_chunks)]());
  share_out(0, num_chunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for_positives(problem, chunk, [&](int64_t image, int64_t anchor, float weight, const Box& gt_box) {
        sums[static_cast<size_t>(chunk)] += static_cast<double>(weight * loss_of(image, anchor, gt_box));
      });
    }
  });
  double sum = 0.0;
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {  // in one order, whatever the threads did
    sum += sums[static_cast<size_t>(chunk)];
  }
  *loss = static_cast<float>(sum);
}

// Zeros, and at_positive(image, anchor, weight, box of the object) for each positive, whose row of so many numbers it
// writes.
template <class Function>
void fill_gradient(const PositivesProblem& problem, int64_t width, void* gradient, Function at_positive) {
  check_offsets(problem.gt_offsets, problem.batch_size, problem.num_gt);
  const int64_t row_bytes = width * bytes_of(problem.predictions.type);
  share_out(0, problem.batch_size * chunks_per_image(problem), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t image = chunk / chunks_per_image(problem);
      const int64_t first = chunk % chunks_per_image(problem) * kChunkAnchors;
      const int64_t left = problem.num_anchors - first;
      std::memset(static_cast<char*>(gradient) + (image * problem.num_anchors + first) * row_bytes, 0,
                  static_cast<size_t>((left < kChunkAnchors ? left : kChunkAnchors) * row_bytes));
      for_positives(problem, chunk, at_positive);
    }
  });
}

LossAndSlopes loss_at(const BoxLossProblem& problem, int64_t image, int64_t anchor, const Box& gt_box) {
  return box_loss_of(problem, load_row(problem.anchors, 0, anchor), load_row(problem.predictions, image, anchor),
                     gt_box);
}

void box_loss_cpu(const BoxLossProblem& problem, const Tensor&, float* loss) {
  sum_positives(problem, loss, [&](int64_t image, int64_t anchor, const Box& gt_box) {
    return loss_at(problem, image, anchor, gt_box).loss;
  });
}

void box_loss_backward_cpu(const BoxLossProblem& problem, const Tensor&, const float* grad_output, void* gradient) {
  fill_gradient(problem, 4, gradient, [&](int64_t image, int64_t anchor, float weight, const Box& gt_box) {
    LossAndSlopes positive = loss_at(problem, image, anchor, gt_box);
    for (float& slope : positive.slopes) {
      slope *= *grad_output * weight;
    }
    baseline::store_floats(positive.slopes, 4, problem.predictions.type, gradient,
                           4 * (image * problem.num_anchors + anchor));
  });
}

// Calls at_side(side, its bins, its softmax, what reads the logit of a bin) for the four sides of a positive.
template <class Function>
void for_sides(const DistributionLossProblem& problem, int64_t image, int64_t anchor, const Box& gt_box,
               Function at_side) {
  const FloatInput& logits = problem.predictions;
  const float stride = load_float(problem.strides, anchor * problem.strides.row_stride);
  const Box anchor_box = load_row(problem.anchors, 0, anchor);
  for (int64_t side = 0; side < 4; ++side) {
    const int64_t first = image * logits.image_stride + anchor * logits.row_stride;
    const auto logit = [&](int64_t bin) {
      return load_float(logits, first + (side * problem.num_bins + bin) * logits.column_stride);
    };
    at_side(side, bins_of(problem, anchor_box, gt_box, stride, side), softmax_of(problem.num_bins, logit), logit);
  }
}

void distribution_loss_cpu(const DistributionLossProblem& problem, const Tensor&, float* loss) {
  sum_positives(problem, loss, [&](int64_t image, int64_t anchor, const Box& gt_box) {
    float sum = 0.0f;
    for_sides(problem, image, anchor, gt_box, [&](int64_t, const Bins& bins, const Softmax& softmax, auto logit) {
      sum += distribution_loss_of(bins, softmax, logit);
    });
    return sum;
  });
}

void distribution_loss_backward_cpu(const DistributionLossProblem& problem, const Tensor&, const float* grad_output,
                                    void* gradient) {
  const int64_t width = 4 * problem.num_bins;
  fill_gradient(problem, width, gradient, [&](int64_t image, int64_t anchor, float weight, const Box& gt_box) {
    const int64_t row = (image * problem.num_anchors + anchor) * width;
    for_sides(problem, image, anchor, gt_box, [&](int64_t side, const Bins& bins, const Softmax& softmax, auto logit) {
      for (int64_t bin = 0; bin < problem.num_bins; ++bin) {
        const float slope = *grad_output * weight * distribution_slope_of(bins, softmax, bin, logit(bin));
        baseline::store_floats(&slope, 1, problem.predictions.type, gradient, row + side * problem.num_bins + bin);
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CPU, m) {
  m.impl("box_loss", TORCH_BOX(&box_loss<box_loss_cpu>));
  m.impl("box_loss_backward", TORCH_BOX(&box_loss_backward<box_loss_backward_cpu>));
  m.impl("distribution_loss", TORCH_BOX(&distribution_loss<distribution_loss_cpu>));
  m.impl("distribution_loss_backward", TORCH_BOX(&distribution_loss_backward<distribution_loss_backward_cpu>));
}

}  // namespace
}  // namespace mg_ops
