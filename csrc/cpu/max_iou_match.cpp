// mg_ops::max_iou_match on the CPU.
#include <torch/csrc/stable/library.h>

#include "../max_iou_match.h"
#include "instruction_set.h"
#include "run_rule.h"

namespace mg_ops {

MG_OPS_DECLARE_RULE_KERNELS(max_iou_kernels)

namespace {

void max_iou_match_cpu(const MaxIouProblem& problem, const Tensor&) {
  static const RuleKernels kernels = MG_OPS_FOR_THIS_PROCESSOR(max_iou_kernels());
  run_rule(kernels, problem, "max_iou_match");
}

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CPU, m) { m.impl("max_iou_match", TORCH_BOX(&max_iou_match<max_iou_match_cpu>)); }

}  // namespace
}  // namespace mg_ops
