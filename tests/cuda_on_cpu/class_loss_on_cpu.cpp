// The CUDA kernels of the classification losses as a plain C function, run by cuda_on_cpu.h; tests/test_class_losses.py
// calls it through ctypes.
#include "cuda_on_cpu.h"
// The built-ins come first.
#include "../../csrc/cuda/class_loss_kernels.cuh"

#include <cstdio>
#include <stdexcept>

namespace {

void launch(int64_t grid, uint64_t seed, std::function<void()> kernel) {
  cuda_on_cpu::LaunchOptions options;
  options.seed = seed;
  options.resident_blocks = 1 + static_cast<int>(seed % 4);
  cuda_on_cpu::Launch({static_cast<unsigned>(grid), 1, 1}, mg_ops::cuda::kLossThreads, std::move(kernel), options)
      .run();
}

}  // namespace

// Writes the loss, and its gradient times `grad_output`; 0, or 1 with what went wrong in `message`.
extern "C" int class_loss_on_cpu(const void* logits, const int64_t* strides, int32_t type, const int64_t* sizes,
                                 const int64_t* class_targets, const float* soft_targets, const float* numbers,
                                 int32_t weigh_by_target, float grad_output, uint64_t seed, float* loss, void* gradient,
                                 char* message, int message_bytes) {
  using namespace mg_ops;
  using namespace mg_ops::cuda;
  try {
    ClassLossProblem problem{};
    problem.logits = {logits, strides[0], strides[1], strides[2], static_cast<FloatType>(type), false};
    problem.class_targets = class_targets;
    problem.batch_size = sizes[0];
    problem.num_anchors = sizes[1];
    problem.num_classes = sizes[2];
    problem.target_image_stride = sizes[1];
    problem.target_stride = 1;
    problem.soft_targets = {soft_targets, sizes[1], 1, 0, FloatType::kFloat32, false};
    problem.params = {numbers[0], numbers[1], numbers[2], numbers[3], weigh_by_target != 0};
    LaunchedClassLoss launch_of = launched(problem);
    const int64_t grid = problem.batch_size * launch_of.blocks_per_image;
    std::vector<double> sums(static_cast<size_t>(grid), -1e30);  // what new_empty returns is anything
    launch_of.block_sums = sums.data();
    launch_of.grad_output = &grad_output;
    launch_of.gradient = gradient;
    cuda::with_exponent(problem.params.negative_gamma, [&](auto exponent) {
      launch(grid, seed, [&] { class_loss_kernel<decltype(exponent)::value>(launch_of); });
      launch(grid, seed + 2, [&] { class_loss_backward_kernel<decltype(exponent)::value>(launch_of); });
    });
    launch(1, seed + 1, [&] { sum_kernel(sums.data(), grid, loss); });
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, static_cast<size_t>(message_bytes), "%s", error.what());
    return 1;
  }
}
