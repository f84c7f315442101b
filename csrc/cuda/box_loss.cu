// mg_ops::box_loss and its backward on CUDA tensors: launches on the caller's device and stream. Nothing is read back,
// and nothing waits for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../box_loss_op.h"
#include "box_loss_kernels.cuh"
#include "launch.h"

namespace mg_ops::cuda {
namespace {

void box_loss_cuda(const BoxLossProblem& problem, const Tensor& predictions, float* loss) {
  const torch::stable::accelerator::DeviceGuard guard(predictions.get_device_index());
  LaunchedBoxLoss launch = launched(problem);
  const int64_t grid = checked_grid("predictions", problem.batch_size, launch.blocks_per_image);
  const cudaStream_t stream = current_stream(predictions);
  // Released when this returns, which torch's allocator allows: later work on this stream comes after the kernels.
  const Tensor sums = torch::stable::new_empty(predictions, {grid}, ScalarType::Double);
  launch.block_sums = static_cast<double*>(sums.mutable_data_ptr());
  if (grid > 0) {
    box_loss_kernel<<<static_cast<unsigned>(grid), kLossThreads, 0, stream>>>(launch);
    check_launch("box_loss");
  }
  sum_kernel<<<1, kLossThreads, 0, stream>>>(launch.block_sums, grid, loss);
  check_launch("box_loss");
}

void box_loss_backward_cuda(const BoxLossProblem& problem, const Tensor& predictions, const float* grad_output,
                            void* gradient) {
  const torch::stable::accelerator::DeviceGuard guard(predictions.get_device_index());
  LaunchedBoxLoss launch = launched(problem);
  launch.grad_output = grad_output;
  launch.gradient = gradient;
  const int64_t grid = checked_grid("predictions", problem.batch_size, launch.blocks_per_image);
  if (grid > 0) {
    box_loss_backward_kernel<<<static_cast<unsigned>(grid), kLossThreads, 0, current_stream(predictions)>>>(launch);
    check_launch("box_loss_backward");
  }
}

}  // namespace
}  // namespace mg_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CUDA, m) {
  m.impl("box_loss", TORCH_BOX(&mg_ops::box_loss<mg_ops::cuda::box_loss_cuda>));
  m.impl("box_loss_backward", TORCH_BOX(&mg_ops::box_loss_backward<mg_ops::cuda::box_loss_backward_cuda>));
}
