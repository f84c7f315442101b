// mg_ops::mutual_match on CUDA tensors: allocates one block of scratch and launches on the caller's device and stream.
// Nothing is read back, and nothing waits for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>

#include "../mutual_match.h"
#include "launch.h"
#include "mutual_match_kernels.cuh"

namespace mg_ops::cuda {
namespace {

void mutual_match_cuda(const MatchProblem& problem, const Tensor& anchors) {
  // Images and classes are numbered in 31 bits.
  constexpr int64_t kMaxCount = std::numeric_limits<int32_t>::max();
  if (problem.batch_size > kMaxCount) {
    fail("mutual_match: expected at most ", kMaxCount, " images, got ", problem.batch_size, ": split the batch");
  }
  if (problem.num_classes > kMaxCount) {
    fail("cls_scores: expected at most ", kMaxCount, " classes, got ", problem.num_classes);
  }

  const torch::stable::accelerator::DeviceGuard guard(anchors.get_device_index());
  LaunchedProblem launched{problem};
  // Released when this returns, which torch's allocator allows: later work on this stream comes after the kernels.
  const int64_t scratch_bytes = static_cast<int64_t>(place_scratch(launched, nullptr));
  const Tensor scratch = torch::stable::new_empty(anchors, {scratch_bytes}, ScalarType::Byte);
  place_scratch(launched, static_cast<char*>(scratch.mutable_data_ptr()));

  const cudaStream_t stream = current_stream(anchors);
  launch_mutual_match(launched, [&](int64_t grid_x, int64_t grid_y, int threads, auto kernel) {
    const dim3 grid(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y));
    kernel<<<grid, threads, 0, stream>>>(launched);
    check_launch("mutual_match");
  });
}

}  // namespace
}  // namespace mg_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CUDA, m) {
  m.impl("mutual_match", TORCH_BOX(&mg_ops::mutual_match<mg_ops::cuda::mutual_match_cuda>));
}
