// Launches the kernels of a rule: one block of scratch, the caller's device and stream. Nothing is read back, and
// nothing waits for the device.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <limits>

#include "../mutual_match.h"
#include "block_select.cuh"
#include "launch.h"

namespace mg_ops::cuda::rules {

// `launch_kernels(launched, launch)` calls launch(grid, kernel) for each kernel.
template <typename Launched, typename LaunchKernels>
void launch_rule(const char* operator_name, Launched launched, const Tensor& anchors, LaunchKernels launch_kernels) {
  // Blocks are numbered in 31 bits, classes too.
  constexpr int64_t kMaxCount = std::numeric_limits<int32_t>::max();
  if (launched.num_anchors > 0 && launched.batch_size > kMaxCount / (launched.num_anchors / kThreads + 1)) {
    fail(operator_name, ": expected at most ", kMaxCount, " blocks of ", kThreads, " anchors, got ",
         launched.batch_size, " images of ", launched.num_anchors, " anchors: split the batch");
  }
  if (launched.num_classes > kMaxCount) {
    fail("cls_scores: expected at most ", kMaxCount, " classes, got ", launched.num_classes);
  }
  const torch::stable::accelerator::DeviceGuard guard(anchors.get_device_index());
  // Released when this returns, which torch's allocator allows: later work on this stream comes after the kernels.
  const int64_t scratch_bytes = static_cast<int64_t>(place_scratch(launched, nullptr));
  const Tensor scratch = torch::stable::new_empty(anchors, {scratch_bytes}, ScalarType::Byte);
  place_scratch(launched, static_cast<char*>(scratch.mutable_data_ptr()));
  const cudaStream_t stream = current_stream(anchors);
  launch_kernels(launched, [&](int64_t grid, auto kernel) {
    kernel<<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(launched);
    check_launch(operator_name);
  });
}

}  // namespace mg_ops::cuda::rules
