// mg_ops::dynamic_mutual_match on CUDA tensors.
#include <torch/csrc/stable/library.h>

#include "../dynamic_mutual_match.h"
#include "dynamic_mutual_match_kernels.cuh"
#include "rule_launch.h"

namespace mg_ops::cuda::rules::dynamic_mutual {
namespace {

void dynamic_mutual_match_cuda(const DynamicMutualProblem& problem, const Tensor& anchors) {
  launch_rule(
      "dynamic_mutual_match", LaunchedDynamicMutual{problem, {}, {}, {}}, anchors,
      [](const LaunchedDynamicMutual& launched, auto launch) { launch_dynamic_mutual_match(launched, launch); });
}

}  // namespace
}  // namespace mg_ops::cuda::rules::dynamic_mutual

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CUDA, m) {
  m.impl("dynamic_mutual_match",
         TORCH_BOX(&mg_ops::dynamic_mutual_match<mg_ops::cuda::rules::dynamic_mutual::dynamic_mutual_match_cuda>));
}
