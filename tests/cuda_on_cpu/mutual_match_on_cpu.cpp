// The CUDA kernels of mutual matching as a plain C function, run by cuda_on_cpu.h. Python calls it through ctypes
// (tests/cuda_on_cpu/__init__.py mirrors EmulatedCall).
#include "cuda_on_cpu.h"
// The built-ins come first.
#include "../../csrc/cuda/mutual_match_kernels.cuh"

#include <cstdio>
#include <stdexcept>

namespace {

struct StridedArray {
  const void* data;
  int64_t strides[3];  // in elements, outermost first; anchors and objects have an image stride of 0
  int32_t type;        // FloatType; of integers: 1 for int64, 0 for int32
  int32_t whole_rows;
};

struct EmulatedCall {
  StridedArray anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd;
  int64_t batch_size, num_anchors, num_classes, num_gt;
  int32_t decode;
  float weight_x, weight_y, weight_w, weight_h, clip;
  int32_t scores_are_probabilities, classification_by_regressed, localization_by_amplified;
  float sigma, iou_positive, iou_ignored, crowd_overlap;
  int64_t *cls_match, *loc_match;
  int32_t *num_pos, *num_total;
  uint64_t seed;
  int64_t scores_read, scratch_bytes, launches;  // results
};

mg_ops::FloatInput float_input(const StridedArray& array) {
  return {array.data,
          array.strides[0],
          array.strides[1],
          array.strides[2],
          static_cast<mg_ops::FloatType>(array.type),
          array.whole_rows != 0};
}

mg_ops::IntegerInput integer_input(const StridedArray& array) {
  return {array.data, array.strides[0], array.type != 0};
}

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
  problem.anchors = float_input(call.anchors);
  problem.pred_boxes = float_input(call.pred_boxes);
  problem.cls_scores = float_input(call.cls_scores);
  problem.gt_boxes = float_input(call.gt_boxes);
  problem.gt_labels = integer_input(call.gt_labels);
  problem.gt_offsets = integer_input(call.gt_offsets);
  problem.gt_crowd = static_cast<const uint8_t*>(call.gt_crowd.data);
  problem.crowd_stride = call.gt_crowd.strides[0];
  problem.batch_size = call.batch_size;
  problem.num_anchors = call.num_anchors;
  problem.num_classes = call.num_classes;
  problem.num_gt = call.num_gt;
  problem.decode = call.decode != 0;
  problem.scores_are_probabilities = call.scores_are_probabilities != 0;
  problem.coder = {call.weight_x, call.weight_y, call.weight_w, call.weight_h, call.clip};
  problem.params = {call.classification_by_regressed != 0,
                    call.localization_by_amplified != 0,
                    call.sigma,
                    call.iou_positive,
                    call.iou_ignored,
                    call.crowd_overlap};
  problem.cls_match = call.cls_match;
  problem.loc_match = call.loc_match;
  problem.num_pos = call.num_pos;
  problem.num_total = call.num_total;

  const size_t bytes = mg_ops::cuda::place_scratch(problem, nullptr);
  void* memory = nullptr;
  if (posix_memalign(&memory, 32, bytes == 0 ? 32 : bytes) != 0) {
    throw std::bad_alloc();
  }
  const std::unique_ptr<void, void (*)(void*)> owner(memory, std::free);
  std::memset(memory, 0xa5, bytes);  // what new_empty returns is anything
  mg_ops::cuda::place_scratch(problem, static_cast<char*>(memory));

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
  call.scratch_bytes = static_cast<int64_t>(bytes);
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
