// The CUDA kernels of the rules beside mutual matching as plain C functions, run by cuda_on_cpu.h. Python calls them
// through ctypes (tests/cuda_on_cpu/rules.py mirrors RuleCall).
#include "cuda_on_cpu.h"
// The built-ins come first.
#include "../../csrc/cuda/atss_match_kernels.cuh"
#include "../../csrc/cuda/dynamic_k_match_kernels.cuh"
#include "../../csrc/cuda/dynamic_mutual_match_kernels.cuh"
#include "../../csrc/cuda/max_iou_match_kernels.cuh"
#include "../../csrc/cuda/task_aligned_match_kernels.cuh"

#include <cstdio>
#include <stdexcept>

namespace {

struct RuleCall {
  mg_ops::FloatInput anchors, pred_boxes, cls_scores, gt_boxes;
  mg_ops::IntegerInput gt_labels, gt_offsets;
  const uint8_t* gt_crowd;
  int64_t crowd_stride;
  int64_t batch_size, num_anchors, num_classes, num_gt;
  int32_t decode, scores_are_probabilities;
  mg_ops::BoxCoder coder;
  float options[32];  // in the operator's order; a list begins with its length, None is NaN
  // Results: of a rule with one match the first ones, and no qualities where it has none.
  int64_t* match[2];
  float* qualities[2];
  int32_t* counts[2];
  uint64_t seed;
  int64_t scratch_bytes, launches;  // results
};

void read_inputs(mg_ops::MatchProblem& problem, const RuleCall& call) {
  problem.anchors = call.anchors;
  problem.pred_boxes = call.pred_boxes;
  problem.cls_scores = call.cls_scores;
  problem.gt_boxes = call.gt_boxes;
  problem.gt_labels = call.gt_labels;
  problem.gt_offsets = call.gt_offsets;
  problem.gt_crowd = call.gt_crowd;
  problem.crowd_stride = call.crowd_stride;
  problem.batch_size = call.batch_size;
  problem.num_anchors = call.num_anchors;
  problem.num_classes = call.num_classes;
  problem.num_gt = call.num_gt;
  problem.decode = call.decode != 0;
  problem.scores_are_probabilities = call.scores_are_probabilities != 0;
  problem.coder = call.coder;
  problem.cls_match = call.match[0];
  problem.num_pos = call.counts[0];
}

template <typename Launched, typename LaunchKernels>
void launch_rule(RuleCall& call, Launched& problem, LaunchKernels launch_kernels) {
  const size_t bytes = place_scratch(problem, nullptr);
  void* memory = nullptr;
  if (posix_memalign(&memory, 32, bytes == 0 ? 32 : bytes) != 0) {
    throw std::bad_alloc();
  }
  const std::unique_ptr<void, void (*)(void*)> owner(memory, std::free);
  std::memset(memory, 0xa5, bytes);  // what new_empty returns is anything
  place_scratch(problem, static_cast<char*>(memory));
  call.scratch_bytes = static_cast<int64_t>(bytes);
  call.launches = 0;
  launch_kernels(problem, [&](int64_t grid, auto kernel) {
    cuda_on_cpu::LaunchOptions options;
    options.seed = call.seed + static_cast<uint64_t>(call.launches++);
    options.resident_blocks = 1 + static_cast<int>(options.seed % 4);
    options.yield_probability = options.seed % 3 == 0 ? 0.0 : 0.2;
    cuda_on_cpu::Launch(
        {static_cast<unsigned>(grid), 1, 1}, mg_ops::cuda::kThreads, [&] { kernel(problem); }, options)
        .run();
  });
}

// 0, or 1 with what went wrong in `message`.
template <typename Run>
int report(Run run, char* message, int message_bytes) {
  try {
    run();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, static_cast<size_t>(message_bytes), "%s", error.what());
    return 1;
  }
}

}  // namespace

extern "C" int max_iou_match_on_cpu(RuleCall* call, char* message, int message_bytes) {
  using namespace mg_ops::cuda::rules;
  LaunchedMaxIou problem{};
  read_inputs(problem, *call);
  problem.iou_positive = call->options[0];
  problem.iou_ignored = call->options[1];
  problem.low_quality = static_cast<mg_ops::LowQuality>(call->options[2]);
  problem.iou_low_quality = call->options[3];
  problem.crowd_overlap = call->options[4];
  const auto launch_kernels = [](const LaunchedMaxIou& launched, auto launch) {
    launch_max_iou_match(launched, launch);
  };
  return report([&] { launch_rule(*call, problem, launch_kernels); }, message, message_bytes);
}

extern "C" int task_aligned_match_on_cpu(RuleCall* call, char* message, int message_bytes) {
  using namespace mg_ops::cuda::rules::task_aligned;
  LaunchedTaskAligned problem{};
  read_inputs(problem, *call);
  const float* option = call->options;
  problem.alpha = mg_ops::make_exponent(*option++);
  problem.beta = mg_ops::make_exponent(*option++);
  problem.k = static_cast<int32_t>(*option++);
  problem.k_after_conflict = static_cast<int32_t>(*option++);
  problem.by_ciou = *option++ != 0;
  problem.inside_first = *option++ != 0;
  problem.conflict = static_cast<mg_ops::Conflict>(*option++);
  problem.minimum_side = *option++;
  problem.center_margin = *option++;
  problem.epsilon = *option++;
  problem.crowd_overlap = *option++;
  problem.soft_targets = call->qualities[0];
  const auto launch_kernels = [](const LaunchedTaskAligned& launched, auto launch) {
    launch_task_aligned_match(launched, launch);
  };
  return report([&] { launch_rule(*call, problem, launch_kernels); }, message, message_bytes);
}

static int run_dynamic_k(mg_ops::cuda::rules::dynamic_k::LaunchedDynamicK& problem, RuleCall* call, char* message,
                         int message_bytes) {
  using namespace mg_ops::cuda::rules::dynamic_k;
  set_constants(problem);
  problem.soft_targets = call->qualities[0];
  const auto launch_kernels = [](const LaunchedDynamicK& launched, auto launch) {
    launch_dynamic_k_match(launched, launch);
  };
  return report([&] { launch_rule(*call, problem, launch_kernels); }, message, message_bytes);
}

extern "C" int simota_match_on_cpu(RuleCall* call, char* message, int message_bytes) {
  mg_ops::cuda::rules::dynamic_k::LaunchedDynamicK problem{};
  read_inputs(problem, *call);
  const float* option = call->options;
  problem.k = static_cast<int32_t>(*option++);
  problem.center_radius = *option++;
  problem.iou_weight = *option++;
  problem.cls_weight = *option++;
  problem.rule = static_cast<mg_ops::DynamicKRule>(*option++);
  problem.crowd_overlap = *option++;
  return run_dynamic_k(problem, call, message, message_bytes);
}

extern "C" int dynamic_soft_label_match_on_cpu(RuleCall* call, char* message, int message_bytes) {
  mg_ops::cuda::rules::dynamic_k::LaunchedDynamicK problem{};
  read_inputs(problem, *call);
  const float* option = call->options;
  problem.rule = mg_ops::DynamicKRule::kSoftLabel;
  problem.k = static_cast<int32_t>(*option++);
  problem.center_radius = *option++;
  problem.iou_weight = *option++;
  problem.cls_weight = 1.0f;
  problem.crowd_overlap = *option++;
  return run_dynamic_k(problem, call, message, message_bytes);
}

extern "C" int atss_match_on_cpu(RuleCall* call, char* message, int message_bytes) {
  using namespace mg_ops::cuda::rules::atss;
  LaunchedAtss problem{};
  read_inputs(problem, *call);
  const float* option = call->options;
  problem.num_levels = static_cast<int32_t>(*option++);
  for (int32_t level = 0; level < problem.num_levels; ++level) {
    problem.level_begin[level + 1] = problem.level_begin[level] + static_cast<int32_t>(*option++);
  }
  problem.k = static_cast<int32_t>(*option++);
  problem.center_margin = *option++;
  problem.test_centers = problem.center_margin == problem.center_margin;
  problem.crowd_overlap = *option++;
  const auto launch_kernels = [](const LaunchedAtss& launched, auto launch) { launch_atss_match(launched, launch); };
  return report([&] { launch_rule(*call, problem, launch_kernels); }, message, message_bytes);
}

extern "C" int dynamic_mutual_match_on_cpu(RuleCall* call, char* message, int message_bytes) {
  using namespace mg_ops::cuda::rules::dynamic_mutual;
  LaunchedDynamicMutual problem{};
  read_inputs(problem, *call);
  const float* option = call->options;
  problem.classification_by_regressed = *option++ != 0;
  problem.localization_by_amplified = *option++ != 0;
  problem.k = static_cast<int32_t>(*option++);
  problem.sigma = *option++;
  problem.crowd_overlap = *option++;
  problem.loc_match = call->match[1];
  problem.soft_targets = call->qualities[0];
  problem.loc_weights = call->qualities[1];
  problem.num_loc_pos = call->counts[1];
  const auto launch_kernels = [](const LaunchedDynamicMutual& launched, auto launch) {
    launch_dynamic_mutual_match(launched, launch);
  };
  return report([&] { launch_rule(*call, problem, launch_kernels); }, message, message_bytes);
}

extern "C" int threads_of_a_block() { return mg_ops::cuda::kThreads; }
