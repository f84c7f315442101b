// The CUDA kernels of the box losses as a plain C function, run by cuda_on_cpu.h; tests/test_box_losses.py calls it
// through ctypes.
#include "cuda_on_cpu.h"
// The built-ins come first.
#include "../../csrc/cuda/box_loss_kernels.cuh"

#include <cstdio>
#include <stdexcept>

namespace {

using namespace mg_ops;
using namespace mg_ops::cuda;

void launch(int64_t grid, uint64_t seed, std::function<void()> kernel) {
  cuda_on_cpu::LaunchOptions options;
  options.seed = seed;
  options.resident_blocks = 1 + static_cast<int>(seed % 4);
  cuda_on_cpu::Launch({static_cast<unsigned>(grid), 1, 1}, mg_ops::cuda::kLossThreads, std::move(kernel), options)
      .run();
}

template <class Problem>
void run(const Problem& problem, int64_t threads, int64_t backward_threads, void (*kernel)(const Launched<Problem>),
         void (*backward_kernel)(const Launched<Problem>), float grad_output, uint64_t seed, float* loss,
         void* gradient) {
  Launched<Problem> forward = launched(problem, threads), backward = launched(problem, backward_threads);
  const int64_t grid = problem.batch_size * forward.blocks_per_image;
  std::vector<double> sums(static_cast<size_t>(grid), -1e30);  // what new_empty returns is anything
  forward.block_sums = sums.data();
  backward.grad_output = &grad_output;
  backward.gradient = gradient;
  launch(grid, seed, [&] { kernel(forward); });
  launch(1, seed + 1, [&] { sum_kernel(sums.data(), grid, loss); });
  launch(problem.batch_size * backward.blocks_per_image, seed + 2, [&] { backward_kernel(backward); });
}

// Of contiguous float32 tensors, but for the predictions.
void fill(PositivesProblem& problem, const void* predictions, FloatType type, const int64_t* sizes, int64_t width,
          const float* anchors, const int64_t* match, const float* gt_boxes, const int64_t* gt_offsets,
          const float* weights) {
  const int64_t num_anchors = sizes[1];
  problem.predictions = {predictions, width * num_anchors, width, 1, type, width == 4};
  problem.anchors = {anchors, 0, 4, 1, FloatType::kFloat32, true};
  problem.match = match;
  problem.match_image_stride = num_anchors;
  problem.match_stride = 1;
  problem.gt_boxes = {gt_boxes, 0, 4, 1, FloatType::kFloat32, false};
  problem.gt_offsets = {gt_offsets, 1, true};
  problem.weights = {weights, num_anchors, 1, 0, FloatType::kFloat32, false};
  problem.batch_size = sizes[0];
  problem.num_anchors = num_anchors;
  problem.num_gt = sizes[2];
}

}  // namespace

// All tensors are contiguous, all but the predictions float32 or int64; `coder` may be null. Writes the loss, and its
// gradient times `grad_output`; 0, or 1 with what went wrong in `message`.
extern "C" int box_loss_on_cpu(const void* predictions, int32_t type, const int64_t* sizes, const float* anchors,
                               const int64_t* match, const float* gt_boxes, const int64_t* gt_offsets,
                               const float* weights, const float* coder, int64_t loss_number, const float* numbers,
                               float grad_output, uint64_t seed, float* loss, void* gradient, char* message,
                               int message_bytes) {
  try {
    BoxLossProblem problem{};
    fill(problem, predictions, static_cast<FloatType>(type), sizes, 4, anchors, match, gt_boxes, gt_offsets, weights);
    problem.decode = coder != nullptr;
    if (problem.decode) {
      problem.coder = {coder[0], coder[1], coder[2], coder[3], coder[4]};
    }
    problem.loss = static_cast<BoxLoss>(loss_number);
    problem.alpha = numbers[0];
    problem.gamma = numbers[1];
    problem.beta = numbers[2];
    problem.balance = std::expm1(numbers[1] / numbers[0]);
    run(problem, problem.num_anchors, problem.num_anchors, box_loss_kernel, box_loss_backward_kernel, grad_output, seed,
        loss, gradient);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, static_cast<size_t>(message_bytes), "%s", error.what());
    return 1;
  }
}

// The same of the distribution focal loss; `strides` (A,) are float32.
extern "C" int distribution_loss_on_cpu(const void* predictions, int32_t type, const int64_t* sizes,
                                        const float* anchors, const int64_t* match, const float* gt_boxes,
                                        const int64_t* gt_offsets, const float* weights, const float* strides,
                                        int64_t num_bins, float margin, float grad_output, uint64_t seed, float* loss,
                                        void* gradient, char* message, int message_bytes) {
  try {
    DistributionLossProblem problem{};
    fill(problem, predictions, static_cast<FloatType>(type), sizes, 4 * num_bins, anchors, match, gt_boxes, gt_offsets,
         weights);
    problem.strides = {strides, 0, 1, 0, FloatType::kFloat32, false};
    problem.num_bins = num_bins;
    problem.margin = margin;
    const int64_t sides = 4 * problem.num_anchors;
    run(problem, sides, sides * num_bins, distribution_loss_kernel, distribution_loss_backward_kernel, grad_output,
        seed, loss, gradient);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, static_cast<size_t>(message_bytes), "%s", error.what());
    return 1;
  }
}
