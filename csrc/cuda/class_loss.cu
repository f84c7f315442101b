// mg_ops::class_loss and its backward on CUDA tensors: launches on the caller's device and stream. Nothing is read
// back, and nothing waits for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>

#include "../class_loss_op.h"
#include "class_loss_kernels.cuh"
#include "launch.h"

namespace mg_ops::cuda {
namespace {

int64_t grid_of(const LaunchedClassLoss& problem) {
  if (problem.num_classes > std::numeric_limits<int32_t>::max() - kLogitsABlock) {  // numbered in 32 bits
    fail("cls_logits: expected fewer classes, got ", problem.num_classes);
  }
  return checked_grid("cls_logits", problem.batch_size, problem.blocks_per_image);
}

void class_loss_cuda(const ClassLossProblem& problem, const Tensor& logits, float* loss) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  LaunchedClassLoss launch = launched(problem);
  const int64_t grid = grid_of(launch);
  const cudaStream_t stream = current_stream(logits);
  // Released when this returns, which torch's allocator allows: later work on this stream comes after the kernels.
  const Tensor sums = torch::stable::new_empty(logits, {grid}, ScalarType::Double);
  launch.block_sums = static_cast<double*>(sums.mutable_data_ptr());
  if (grid > 0) {
    with_exponent(problem.params.negative_gamma, [&](auto exponent) {
      class_loss_kernel<decltype(exponent)::value><<<static_cast<unsigned>(grid), kLossThreads, 0, stream>>>(launch);
    });
    check_launch("class_loss");
  }
  sum_kernel<<<1, kLossThreads, 0, stream>>>(launch.block_sums, grid, loss);
  check_launch("class_loss");
}

void class_loss_backward_cuda(const ClassLossProblem& problem, const Tensor& logits, const float* grad_output,
                              void* gradient) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  LaunchedClassLoss launch = launched(problem);
  launch.grad_output = grad_output;
  launch.gradient = gradient;
  const int64_t grid = grid_of(launch);
  if (grid > 0) {
    const cudaStream_t stream = current_stream(logits);
    with_exponent(problem.params.negative_gamma, [&](auto exponent) {
      class_loss_backward_kernel<decltype(exponent)::value>
          <<<static_cast<unsigned>(grid), kLossThreads, 0, stream>>>(launch);
    });
    check_launch("class_loss_backward");
  }
}

}  // namespace
}  // namespace mg_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CUDA, m) {
  m.impl("class_loss", TORCH_BOX(&mg_ops::class_loss<mg_ops::cuda::class_loss_cuda>));
  m.impl("class_loss_backward", TORCH_BOX(&mg_ops::class_loss_backward<mg_ops::cuda::class_loss_backward_cuda>));
}
