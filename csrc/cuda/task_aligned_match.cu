// mg_ops::task_aligned_match on CUDA tensors.
#include <torch/csrc/stable/library.h>

#include "../task_aligned_match.h"
#include "rule_launch.h"
#include "task_aligned_match_kernels.cuh"

namespace mg_ops::cuda::rules::task_aligned {
namespace {

void task_aligned_match_cuda(const TaskAlignedProblem& problem, const Tensor& anchors) {
  launch_rule("task_aligned_match", LaunchedTaskAligned{problem, {}, nullptr, nullptr, nullptr}, anchors,
              [](const LaunchedTaskAligned& launched, auto launch) { launch_task_aligned_match(launched, launch); });
}

}  // namespace
}  // namespace mg_ops::cuda::rules::task_aligned

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CUDA, m) {
  m.impl("task_aligned_match",
         TORCH_BOX(&mg_ops::task_aligned_match<mg_ops::cuda::rules::task_aligned::task_aligned_match_cuda>));
}
