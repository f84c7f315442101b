// mg_ops::atss_match on the CPU.
#include <torch/csrc/stable/library.h>

#include "../atss_match.h"
#include "instruction_set.h"
#include "run_rule.h"

namespace mg_ops {

MG_OPS_DECLARE_RULE_KERNELS(atss_kernels)

namespace {

void atss_match_cpu(const AtssProblem& problem, const Tensor&) {
  static const RuleKernels kernels = MG_OPS_FOR_THIS_PROCESSOR(atss_kernels());
  run_rule(kernels, problem, "atss_match");
}

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CPU, m) { m.impl("atss_match", TORCH_BOX(&atss_match<atss_match_cpu>)); }

}  // namespace
}  // namespace mg_ops
