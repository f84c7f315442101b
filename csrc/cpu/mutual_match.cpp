// mg_ops::mutual_match on the CPU.
#include "../mutual_match.h"

#include <torch/csrc/stable/library.h>

#include "instruction_set.h"
#include "run_rule.h"

namespace mg_ops {

MG_OPS_DECLARE_RULE_KERNELS(mutual_match_kernels)

namespace {

void mutual_match_cpu(const MatchProblem& problem, const Tensor&) {
  static const RuleKernels kernels = MG_OPS_FOR_THIS_PROCESSOR(mutual_match_kernels());
  run_rule(kernels, problem, "mutual_match");
}

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CPU, m) { m.impl("mutual_match", TORCH_BOX(&mutual_match<mutual_match_cpu>)); }

}  // namespace
}  // namespace mg_ops
