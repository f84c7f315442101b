// The CUDA kernels of mutual matching as a plain C function, run by cuda_on_cpu.h. Python calls it through ctypes.
#include "cuda_on_cpu.h"
// The built-ins come first.
#include "mutual_match_call.h"

#include <cstdio>
#include <stdexcept>

namespace {

void launch(int64_t grid_x, int64_t grid_y, int threads, uint64_t seed, std::function<void()> kernel) {
  cuda_on_cpu::LaunchOptions options;
  options.seed = seed;
  options.resident_blocks = 1 + static_cast<int>(seed % 4);
  options.yield_probability = seed % 3 == 0 ? 0.0 : 0.2;
  const cuda_on_cpu::Index3 grid{static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), 1};
  cuda_on_cpu::Launch(grid, static_cast<unsigned>(threads), std::move(kernel), options).run();
}

void match(EmulatedCall& call) {
  mg_ops::cuda::LaunchedProblem problem{};
  const Scratch scratch = make_problem(call, problem);

  const int64_t number_bytes[] = {2, 2, 4, 8};
  const uintptr_t scores = reinterpret_cast<uintptr_t>(call.cls_scores.data);
  const int64_t last_score = (call.batch_size - 1) * call.cls_scores.strides[0] +
                             (call.num_anchors - 1) * call.cls_scores.strides[1] +
                             (call.num_classes - 1) * call.cls_scores.strides[2];
  cuda_on_cpu::watched_loads() = {
      scores, scores + static_cast<uintptr_t>((last_score + 1) * number_bytes[call.cls_scores.type]), 0};
  cuda_on_cpu::notes().clear();
  call.launches = 0;
  mg_ops::cuda::launch_mutual_match(problem, [&](int64_t grid_x, int64_t grid_y, int threads, auto kernel) {
    launch(grid_x, grid_y, threads, call.seed + static_cast<uint64_t>(call.launches++), [&] { kernel(problem); });
  });
  call.scores_read = cuda_on_cpu::watched_loads().count;
}

}  // namespace

// 0, or 1 with what went wrong in `message`.
extern "C" int mutual_match_on_cpu(EmulatedCall* call, char* message, int message_bytes) {
  try {
    match(*call);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, static_cast<size_t>(message_bytes), "%s", error.what());
    return 1;
  }
}

// A kernel with a mistake of each kind, for the test that the emulator notices.
namespace {

struct MistakeShared {
  uint32_t values[mg_ops::cuda::kThreads];
};

void mistaken_kernel(int mistake, uint32_t* output) {
  MG_OPS_SHARED(MistakeShared, shared);
  const uint32_t thread = threadIdx.x;
  if (mistake == 1 && thread == 3) {
    return;  // leaves while others wait at the barrier
  }
  if (mistake == 2 && thread < 16) {
    __syncthreads();  // half a warp at one barrier, half in another operation
  }
  if (mistake == 3) {
    thread % 32 < 8 ? __ballot_sync(mg_ops::cuda::kAllLanes, true) : __reduce_max_sync(mg_ops::cuda::kAllLanes, thread);
  }
  shared.values[thread] = thread;
  if (mistake != 4) {
    __syncthreads();
  }
  output[thread] = shared.values[mg_ops::cuda::kThreads - 1 - thread];
  if (mistake == 5) {
    output[thread] = shared.values[thread + mg_ops::cuda::kThreads];
  }
}

}  // namespace

// Runs a kernel that reverses 0, 1, 2 ..., without a mistake (0) or with one: 1 a thread leaves, 2 a divergent barrier,
// 3 a divergent warp operation, 4 a missing barrier, 5 a read past the end of shared memory.
extern "C" int run_mistake(int mistake, uint64_t seed, uint32_t* output, char* message, int message_bytes) {
  try {
    cuda_on_cpu::LaunchOptions options;
    options.seed = seed;
    cuda_on_cpu::Launch({1, 1, 1}, mg_ops::cuda::kThreads, [&] { mistaken_kernel(mistake, output); }, options).run();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, static_cast<size_t>(message_bytes), "%s", error.what());
    return 1;
  }
}

// How often the kernels of the last call passed an MG_OPS_NOTE, a line each.
extern "C" const char* notes_of_the_last_call() {
  static std::string text;
  text.clear();
  for (const auto& [what, count] : cuda_on_cpu::notes()) {
    text += std::to_string(count) + " " + what + "\n";
  }
  return text.c_str();
}

extern "C" int threads_of_a_block() { return mg_ops::cuda::kThreads; }
extern "C" int list_room() { return static_cast<int>(mg_ops::cuda::kListRoom); }
