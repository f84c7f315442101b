// mg_ops::task_aligned_match on the CPU.
#include <torch/csrc/stable/library.h>

#include "../task_aligned_match.h"
#include "instruction_set.h"
#include "run_rule.h"

namespace mg_ops {

MG_OPS_DECLARE_RULE_KERNELS(task_aligned_kernels)

namespace {

void task_aligned_match_cpu(const TaskAlignedProblem& problem, const Tensor&) {
  static const RuleKernels kernels = MG_OPS_FOR_THIS_PROCESSOR(task_aligned_kernels());
  run_rule(kernels, problem, "task_aligned_match");
}

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CPU, m) {
  m.impl("task_aligned_match", TORCH_BOX(&task_aligned_match<task_aligned_match_cpu>));
}

}  // namespace
}  // namespace mg_ops
