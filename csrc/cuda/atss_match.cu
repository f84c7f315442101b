// mg_ops::atss_match on CUDA tensors.
#include <torch/csrc/stable/library.h>

#include "../atss_match.h"
#include "atss_match_kernels.cuh"
#include "rule_launch.h"

namespace mg_ops::cuda::rules::atss {
namespace {

void atss_match_cuda(const AtssProblem& problem, const Tensor& anchors) {
  launch_rule("atss_match", LaunchedAtss{problem, {}, nullptr, {}}, anchors,
              [](const LaunchedAtss& launched, auto launch) { launch_atss_match(launched, launch); });
}

}  // namespace
}  // namespace mg_ops::cuda::rules::atss

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CUDA, m) {
  m.impl("atss_match", TORCH_BOX(&mg_ops::atss_match<mg_ops::cuda::rules::atss::atss_match_cuda>));
}
