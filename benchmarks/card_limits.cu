// Two questions about a card that the matching kernels turn on, for benchmarks/card_limits.py. Plain C functions, so
// that nvcc makes a shared library of this file and, with `-include tests/cuda_on_cpu/cuda_on_cpu.h`, g++ one to try it
// without a GPU.
#include <cstdint>

#if defined(__CUDACC__)
#define MG_OPS_SHARED(Type, name) __shared__ Type name
#define LAUNCH(kernel, blocks, stream, ...) \
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#define LAUNCH(kernel, blocks, stream, ...)                                                                        \
  cuda_on_cpu::Launch(                                                                                             \
      {static_cast<unsigned>(blocks), 1, 1}, kThreads, [&] { kernel(__VA_ARGS__); }, cuda_on_cpu::LaunchOptions{}) \
      .run()
#endif

namespace {

constexpr int kThreads = 256;

// Each thread divides its numerator by denominator, denominator + 1, ...: no two divisions alike, none to be hoisted. A
// numerator of 0 asks whether the division then leaves its fast path.
__global__ void divide_kernel(const float* numerators, const float* denominators, float* sums, int rounds) {
  const unsigned index = blockIdx.x * kThreads + threadIdx.x;
  const float numerator = numerators[index];
  float denominator = denominators[index];
  float sum = 0.0f;
#pragma unroll 4
  for (int round = 0; round < rounds; ++round) {
    sum += numerator / denominator;
    denominator += 1.0f;
  }
  sums[index] = sum;
}

template <typename Count>
struct Counters {
  Count warps[kThreads / 32][32];
};

// Each lane adds to one of its warp's 32 counters: all to the same one, or each to its own, as `slots` (32 numbers)
// says. Read from memory, so that the compiler cannot know that they are alike and add for the whole warp. Adding the
// constant 1 has an instruction of its own in 32 bits; `amount` is 1 too, but the compiler does not know it.
template <typename Count, bool kByConstant>
__global__ void count_kernel(const int32_t* slots, int64_t* totals, int rounds, Count amount) {
  MG_OPS_SHARED(Counters<Count>, shared);
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  shared.warps[warp][lane] = 0;
  __syncthreads();
  Count* counter = &shared.warps[warp][slots[lane]];
  for (int round = 0; round < rounds; ++round) {
    atomicAdd(counter, kByConstant ? Count{1} : amount);
  }
  __syncthreads();
  totals[blockIdx.x * kThreads + threadIdx.x] = static_cast<int64_t>(shared.warps[warp][lane]);
}

}  // namespace

extern "C" void divide(const float* numerators, const float* denominators, float* sums, int blocks, int rounds,
                       void* stream) {
  LAUNCH(divide_kernel, blocks, stream, numerators, denominators, sums, rounds);
}

extern "C" void count_32(const int32_t* slots, int64_t* totals, int blocks, int rounds, void* stream) {
  LAUNCH((count_kernel<uint32_t, true>), blocks, stream, slots, totals, rounds, 1u);
}

extern "C" void add_32(const int32_t* slots, int64_t* totals, int blocks, int rounds, void* stream) {
  LAUNCH((count_kernel<uint32_t, false>), blocks, stream, slots, totals, rounds, 1u);
}

extern "C" void add_64(const int32_t* slots, int64_t* totals, int blocks, int rounds, void* stream) {
  LAUNCH((count_kernel<unsigned long long, false>), blocks, stream, slots, totals, rounds, 1ull);
}
