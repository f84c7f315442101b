// mg_ops::cuda_device_error: whether this library's CUDA code runs on a device, asked before the first real launch.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

__global__ void probe_kernel(int* output) { *output = 1; }

// The runtime's own words for why not; "" if kernels compiled into this library can be launched there.
std::string cuda_device_error(int64_t device_index) {
  int previous = 0;
  cudaError_t status = cudaGetDevice(&previous);  // no device, or a driver older than the runtime in this library
  if (status == cudaSuccess) {
    status = cudaSetDevice(static_cast<int>(device_index));
    if (status == cudaSuccess) {
      // Loads the kernel, which fails if the library was not compiled for this architecture. Nothing is launched.
      cudaFuncAttributes attributes;
      status = cudaFuncGetAttributes(&attributes, probe_kernel);
    }
    cudaSetDevice(previous);
  }
  cudaGetLastError();  // the answer is the return value: leave no error behind for the next launch
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CompositeExplicitAutograd, m) {
  m.impl("cuda_device_error", TORCH_BOX(&cuda_device_error));
}
