// mg_ops::max_iou_match on CUDA tensors.
#include <torch/csrc/stable/library.h>

#include "../max_iou_match.h"
#include "max_iou_match_kernels.cuh"
#include "rule_launch.h"

namespace mg_ops::cuda::rules {
namespace {

void max_iou_match_cuda(const MaxIouProblem& problem, const Tensor& anchors) {
  launch_rule("max_iou_match", LaunchedMaxIou{problem, {}}, anchors,
              [](const LaunchedMaxIou& launched, auto launch) { launch_max_iou_match(launched, launch); });
}

}  // namespace
}  // namespace mg_ops::cuda::rules

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CUDA, m) {
  m.impl("max_iou_match", TORCH_BOX(&mg_ops::max_iou_match<mg_ops::cuda::rules::max_iou_match_cuda>));
}
