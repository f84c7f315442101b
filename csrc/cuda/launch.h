// What every CUDA launch needs: the current stream, and errors as messages.
//
// The library must also load where torch has no CUDA. So it links the CUDA runtime statically, and the one function it
// needs of libtorch_cuda is a weak symbol: null where torch has no CUDA, and then no CUDA tensor can reach this code.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <stdexcept>
#include <string>

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace mg_ops {

// Raises if a CUDA runtime call failed; `what` says what was being done. (STD_CUDA_CHECK needs libtorch_cuda.)
inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("mg_ops: ") + what + ": " + cudaGetErrorString(status));
  }
}

// Raises if the launch just made was refused. Errors of the kernel itself show at the next synchronization, as in
// torch.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

// The stream torch runs on, on the device of a CUDA tensor.
inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("mg_ops: this torch has no CUDA: install a CUDA build of torch");
  }
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("mg_ops: torch has no current CUDA stream for device " +
                             std::to_string(tensor.get_device_index()));
  }
  return static_cast<cudaStream_t>(stream);
}

// How many blocks a batch needs, which are numbered in 31 bits; raises where they are too many.
inline int64_t checked_grid(const char* name, int64_t batch_size, int64_t blocks_per_image) {
  constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();
  if (blocks_per_image > 0 && batch_size > kMaxBlocks / blocks_per_image) {
    throw std::runtime_error(std::string(name) + ": too large for one call, more than " + std::to_string(kMaxBlocks) +
                             " blocks of threads: split the batch");
  }
  return batch_size * blocks_per_image;
}

}  // namespace mg_ops
