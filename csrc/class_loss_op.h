// mg_ops::class_loss and its backward, once for both backends: checks the arguments, allocates the results, and fills
// the problem that the kernels take.
#pragma once

#include <optional>

#include "class_loss.h"
#include "inputs.h"

namespace mg_ops {

// Raises unless the arguments are as csrc/schema.cpp says, but for the values in the tensors. The tensors live longer
// than the problem, and are replaced by copies where they cannot be read in place.
inline ClassLossProblem class_loss_problem(Tensor& logits, Tensor& class_targets, std::optional<Tensor>& soft_targets,
                                           double positive_weight, double positive_gamma, double negative_weight,
                                           double negative_gamma, bool weigh_by_target) {
  check_tensor("cls_logits", logits, Kind::kFloating, {kAnySize, kAnySize, kAnySize}, logits);
  const int64_t batch_size = logits.size(0), num_anchors = logits.size(1);
  check_int64_tensor("class_targets", class_targets, {batch_size, num_anchors}, logits);
  const auto check_factor = [](const char* name, double value) {
    if (!(value >= 0.0 && value <= kMaxNumber)) {
      fail(name, ": expected a finite number of at least 0, got ", value);
    }
  };
  check_factor("positive_weight", positive_weight);
  check_factor("positive_gamma", positive_gamma);
  check_factor("negative_weight", negative_weight);
  check_factor("negative_gamma", negative_gamma);

  align(logits);
  align(class_targets);
  ClassLossProblem problem{};
  problem.logits = float_input(logits);
  problem.class_targets = static_cast<const int64_t*>(class_targets.const_data_ptr());
  problem.target_image_stride = class_targets.stride(0);
  problem.target_stride = class_targets.stride(1);
  if (soft_targets.has_value()) {
    check_tensor("soft_targets", *soft_targets, Kind::kFloating, {batch_size, num_anchors}, logits);
    align(*soft_targets);
    problem.soft_targets = anchor_input(*soft_targets);
  }
  problem.batch_size = batch_size;
  problem.num_anchors = num_anchors;
  problem.num_classes = logits.size(2);
  problem.params = {static_cast<float>(positive_weight), static_cast<float>(positive_gamma),
                    static_cast<float>(negative_weight), static_cast<float>(negative_gamma), weigh_by_target};
  return problem;
}

// `run` adds everything up into one float32 on the device of the logits.
template <void (*run)(const ClassLossProblem& problem, const Tensor& logits, float* loss)>
Tensor class_loss(Tensor logits, Tensor class_targets, std::optional<Tensor> soft_targets, double positive_weight,
                  double positive_gamma, double negative_weight, double negative_gamma, bool weigh_by_target) {
  const ClassLossProblem problem = class_loss_problem(logits, class_targets, soft_targets, positive_weight,
                                                      positive_gamma, negative_weight, negative_gamma, weigh_by_target);
  const Tensor loss = new_result(logits, {}, ScalarType::Float);
  run(problem, logits, static_cast<float*>(loss.mutable_data_ptr()));
  return loss;
}

// `run` writes the gradient of each logit, times the number at `grad_output`: contiguous, in the dtype of the logits.
template <void (*run)(const ClassLossProblem& problem, const Tensor& logits, const float* grad_output, void* gradient)>
Tensor class_loss_backward(const Tensor& grad_output, Tensor logits, Tensor class_targets,
                           std::optional<Tensor> soft_targets, double positive_weight, double positive_gamma,
                           double negative_weight, double negative_gamma, bool weigh_by_target) {
  const ClassLossProblem problem = class_loss_problem(logits, class_targets, soft_targets, positive_weight,
                                                      positive_gamma, negative_weight, negative_gamma, weigh_by_target);
  check_grad_output(grad_output, logits);
  const Tensor gradient =
      new_result(logits, {problem.batch_size, problem.num_anchors, problem.num_classes}, logits.scalar_type());
  run(problem, logits, static_cast<const float*>(grad_output.const_data_ptr()), gradient.mutable_data_ptr());
  return gradient;
}

}  // namespace mg_ops
