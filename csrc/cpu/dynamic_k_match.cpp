// mg_ops::simota_match and mg_ops::dynamic_soft_label_match on the CPU.
#include "../dynamic_k_match.h"

#include <torch/csrc/stable/library.h>

#include "instruction_set.h"
#include "run_rule.h"

namespace mg_ops {

MG_OPS_DECLARE_RULE_KERNELS(simota_box_or_center_kernels)
MG_OPS_DECLARE_RULE_KERNELS(simota_center_kernels)
MG_OPS_DECLARE_RULE_KERNELS(dynamic_soft_label_kernels)

namespace {

void simota_match_cpu(const DynamicKProblem& problem, const Tensor&) {
  static const RuleKernels box_or_center = MG_OPS_FOR_THIS_PROCESSOR(simota_box_or_center_kernels());
  static const RuleKernels center = MG_OPS_FOR_THIS_PROCESSOR(simota_center_kernels());
  run_rule(problem.rule == DynamicKRule::kCenter ? center : box_or_center, problem, "simota_match");
}

void dynamic_soft_label_match_cpu(const DynamicKProblem& problem, const Tensor&) {
  static const RuleKernels kernels = MG_OPS_FOR_THIS_PROCESSOR(dynamic_soft_label_kernels());
  run_rule(kernels, problem, "dynamic_soft_label_match");
}

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CPU, m) {
  m.impl("simota_match", TORCH_BOX(&simota_match<simota_match_cpu>));
  m.impl("dynamic_soft_label_match", TORCH_BOX(&dynamic_soft_label_match<dynamic_soft_label_match_cpu>));
}

}  // namespace
}  // namespace mg_ops
