// mg_ops::box_loss and its backward on the CPU. Positives are few: the time goes to looking for them and to writing the
// zeros of all others, so one version serves every instruction set.
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

int64_t chunks_per_image(const BoxLossProblem& problem) {
  return (problem.num_anchors + kChunkAnchors - 1) / kChunkAnchors;
}

Box load_row(const FloatInput& input, int64_t image, int64_t row) {
  const int64_t first = image * input.image_stride + row * input.row_stride, step = input.column_stride;
  return {load_float(input, first), load_float(input, first + step), load_float(input, first + 2 * step),
          load_float(input, first + 3 * step)};
}

// Calls at_positive(anchor of the batch, weight, loss and slopes) for each positive of a chunk.
template <class Function>
void for_positives(const BoxLossProblem& problem, int64_t chunk, Function at_positive) {
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
    at_positive(image * problem.num_anchors + anchor, weight,
                box_loss_of(problem, load_row(problem.anchors, 0, anchor), load_row(problem.predictions, image, anchor),
                            load_row(problem.gt_boxes, 0, image_start + object)));
  }
}

void box_loss_cpu(const BoxLossProblem& problem, const Tensor&, float* loss) {
  check_offsets(problem.gt_offsets, problem.batch_size, problem.num_gt);
  const int64_t num_chunks = problem.batch_size * chunks_per_image(problem);
  const std::unique_ptr<double[]> sums(new double[static_cast<size_t>(num_chunks)]());
  share_out(0, num_chunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for_positives(problem, chunk, [&](int64_t, float weight, const LossAndSlopes& positive) {
        sums[static_cast<size_t>(chunk)] += static_cast<double>(weight * positive.loss);
      });
    }
  });
  double sum = 0.0;
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {  // in one order, whatever the threads did
    sum += sums[static_cast<size_t>(chunk)];
  }
  *loss = static_cast<float>(sum);
}

void box_loss_backward_cpu(const BoxLossProblem& problem, const Tensor&, const float* grad_output, void* gradient) {
  check_offsets(problem.gt_offsets, problem.batch_size, problem.num_gt);
  const FloatType type = problem.predictions.type;
  const int64_t row_bytes = 4 * bytes_of(type);
  share_out(0, problem.batch_size * chunks_per_image(problem), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t image = chunk / chunks_per_image(problem);
      const int64_t first = chunk % chunks_per_image(problem) * kChunkAnchors;
      const int64_t left = problem.num_anchors - first;
      std::memset(static_cast<char*>(gradient) + (image * problem.num_anchors + first) * row_bytes, 0,
                  static_cast<size_t>((left < kChunkAnchors ? left : kChunkAnchors) * row_bytes));
      for_positives(problem, chunk, [&](int64_t anchor, float weight, const LossAndSlopes& positive) {
        float slopes[4];
        for (int i = 0; i < 4; ++i) {
          slopes[i] = *grad_output * weight * positive.slopes[i];
        }
        baseline::store_floats(slopes, 4, type, gradient, 4 * anchor);
      });
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CPU, m) {
  m.impl("box_loss", TORCH_BOX(&box_loss<box_loss_cpu>));
  m.impl("box_loss_backward", TORCH_BOX(&box_loss_backward<box_loss_backward_cpu>));
}

}  // namespace
}  // namespace mg_ops
