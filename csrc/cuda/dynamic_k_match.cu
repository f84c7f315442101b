// mg_ops::simota_match and mg_ops::dynamic_soft_label_match on CUDA tensors.
#include "../dynamic_k_match.h"

#include <torch/csrc/stable/library.h>

#include "dynamic_k_match_kernels.cuh"
#include "rule_launch.h"

namespace mg_ops::cuda::rules::dynamic_k {
namespace {

void launch_dynamic_k(const char* operator_name, const DynamicKProblem& problem, const Tensor& anchors) {
  launch_rule(operator_name, LaunchedDynamicK{problem, {}, nullptr, nullptr, nullptr, nullptr}, anchors,
              [](const LaunchedDynamicK& launched, auto launch) { launch_dynamic_k_match(launched, launch); });
}

void simota_match_cuda(const DynamicKProblem& problem, const Tensor& anchors) {
  launch_dynamic_k("simota_match", problem, anchors);
}

void dynamic_soft_label_match_cuda(const DynamicKProblem& problem, const Tensor& anchors) {
  launch_dynamic_k("dynamic_soft_label_match", problem, anchors);
}

}  // namespace
}  // namespace mg_ops::cuda::rules::dynamic_k

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CUDA, m) {
  using namespace mg_ops::cuda::rules::dynamic_k;
  m.impl("simota_match", TORCH_BOX(&mg_ops::simota_match<simota_match_cuda>));
  m.impl("dynamic_soft_label_match", TORCH_BOX(&mg_ops::dynamic_soft_label_match<dynamic_soft_label_match_cuda>));
}
