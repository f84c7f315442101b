// mg_ops::box_loss, mg_ops::distribution_loss and their backwards on CUDA tensors: launches on the caller's device and
// stream. Nothing is read back, and nothing waits for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../box_loss_op.h"
#include "box_loss_kernels.cuh"
#include "launch.h"

namespace mg_ops::cuda {
namespace {

// Adds up what the kernel finds with so many threads an image.
template <class Problem>
void sum_on_gpu(void (*kernel)(const Launched<Problem>), const char* name, const Problem& problem, int64_t threads,
                const Tensor& predictions, float* loss) {
  const torch::stable::accelerator::DeviceGuard guard(predictions.get_device_index());
  Launched<Problem> launch = launched(problem, threads);
  const int64_t grid = checked_grid("predictions", problem.batch_size, launch.blocks_per_image);
  const cudaStream_t stream = current_stream(predictions);
  // Released when this returns, which torch's allocator allows: later work on this stream comes after the kernels.
  const Tensor sums = torch::stable::new_empty(predictions, {grid}, ScalarType::Double);
  launch.block_sums = static_cast<double*>(sums.mutable_data_ptr());
  if (grid > 0) {
    kernel<<<static_cast<unsigned>(grid), kLossThreads, 0, stream>>>(launch);
    check_launch(name);
  }
  sum_kernel<<<1, kLossThreads, 0, stream>>>(launch.block_sums, grid, loss);
  check_launch(name);
}

// Has the kernel write the gradient.
template <class Problem>
void differentiate_on_gpu(void (*kernel)(const Launched<Problem>), const char* name, const Problem& problem,
                          int64_t threads, const Tensor& predictions, const float* grad_output, void* gradient) {
  const torch::stable::accelerator::DeviceGuard guard(predictions.get_device_index());
  Launched<Problem> launch = launched(problem, threads);
  launch.grad_output = grad_output;
  launch.gradient = gradient;
  const int64_t grid = checked_grid("predictions", problem.batch_size, launch.blocks_per_image);
  if (grid > 0) {
    kernel<<<static_cast<unsigned>(grid), kLossThreads, 0, current_stream(predictions)>>>(launch);
    check_launch(name);
  }
}

void box_loss_cuda(const BoxLossProblem& problem, const Tensor& predictions, float* loss) {
  sum_on_gpu(box_loss_kernel, "box_loss", problem, problem.num_anchors, predictions, loss);
}

void box_loss_backward_cuda(const BoxLossProblem& problem, const Tensor& predictions, const float* grad_output,
                            void* gradient) {
  differentiate_on_gpu(box_loss_backward_kernel, "box_loss_backward", problem, problem.num_anchors, predictions,
                       grad_output, gradient);
}

void distribution_loss_cuda(const DistributionLossProblem& problem, const Tensor& predictions, float* loss) {
  sum_on_gpu(distribution_loss_kernel, "distribution_loss", problem, 4 * problem.num_anchors, predictions, loss);
}

void distribution_loss_backward_cuda(const DistributionLossProblem& problem, const Tensor& predictions,
                                     const float* grad_output, void* gradient) {
  const int64_t threads = 4 * problem.num_anchors * problem.num_bins;
  if (threads > (int64_t{1} << 32) - kLossThreads) {
    fail("predictions: expected fewer than 2^32 logits an image, got ", threads);
  }
  differentiate_on_gpu(distribution_loss_backward_kernel, "distribution_loss_backward", problem, threads, predictions,
                       grad_output, gradient);
}

}  // namespace
}  // namespace mg_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CUDA, m) {
  m.impl("box_loss", TORCH_BOX(&mg_ops::box_loss<mg_ops::cuda::box_loss_cuda>));
  m.impl("box_loss_backward", TORCH_BOX(&mg_ops::box_loss_backward<mg_ops::cuda::box_loss_backward_cuda>));
  m.impl("distribution_loss", TORCH_BOX(&mg_ops::distribution_loss<mg_ops::cuda::distribution_loss_cuda>));
  m.impl("distribution_loss_backward",
         TORCH_BOX(&mg_ops::distribution_loss_backward<mg_ops::cuda::distribution_loss_backward_cuda>));
}
