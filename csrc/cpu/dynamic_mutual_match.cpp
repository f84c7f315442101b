// mg_ops::dynamic_mutual_match on the CPU.
#include <torch/csrc/stable/library.h>

#include "../dynamic_mutual_match.h"
#include "instruction_set.h"
#include "run_rule.h"

namespace mg_ops {

MG_OPS_DECLARE_RULE_KERNELS(dynamic_mutual_kernels)

namespace {

void dynamic_mutual_match_cpu(const DynamicMutualProblem& problem, const Tensor&) {
  static const RuleKernels kernels = MG_OPS_FOR_THIS_PROCESSOR(dynamic_mutual_kernels());
  if (problem.num_gt > 0) {
    std::memset(problem.num_loc_pos, 0, static_cast<size_t>(problem.num_gt) * sizeof(int32_t));
  }
  run_rule(kernels, problem, "dynamic_mutual_match");
}

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CPU, m) {
  m.impl("dynamic_mutual_match", TORCH_BOX(&dynamic_mutual_match<dynamic_mutual_match_cpu>));
}

}  // namespace
}  // namespace mg_ops
