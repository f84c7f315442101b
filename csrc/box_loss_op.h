// mg_ops::box_loss, mg_ops::distribution_loss and their backwards, once for both backends: checks the arguments,
// allocates the results, and fills the problem that the kernels take.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "box_loss.h"
#include "inputs.h"

namespace mg_ops {

// What the operators take first, as tensors that live longer than the problem; those that cannot be read in place are
// replaced by copies.
struct PositivesArguments {
  Tensor predictions, anchors, match, gt_boxes, gt_offsets;
  std::optional<Tensor> weights;
};

// Raises unless the arguments are as csrc/schema.cpp says, but for the values in the tensors.
inline void fill_positives(PositivesArguments& a, int64_t width, PositivesProblem& problem) {
  check_tensor("predictions", a.predictions, Kind::kFloating, {kAnySize, kAnySize, width}, a.predictions);
  const int64_t batch_size = a.predictions.size(0), num_anchors = a.predictions.size(1);
  check_tensor("anchors", a.anchors, Kind::kFloating, {num_anchors, 4}, a.predictions);
  check_int64_tensor("match", a.match, {batch_size, num_anchors}, a.predictions);
  check_tensor("gt_boxes", a.gt_boxes, Kind::kFloating, {kAnySize, 4}, a.predictions);
  check_tensor("gt_offsets", a.gt_offsets, Kind::kInteger, {batch_size + 1}, a.predictions);
  if (a.weights.has_value()) {
    check_tensor("weights", *a.weights, Kind::kFloating, {batch_size, num_anchors}, a.predictions);
  }
  for (Tensor* tensor : {&a.predictions, &a.anchors, &a.match, &a.gt_boxes, &a.gt_offsets}) {
    align(*tensor);
  }
  problem.predictions = float_input(a.predictions);
  problem.anchors = float_input(a.anchors);
  problem.match = static_cast<const int64_t*>(a.match.const_data_ptr());
  problem.match_image_stride = a.match.stride(0);
  problem.match_stride = a.match.stride(1);
  problem.gt_boxes = float_input(a.gt_boxes);
  problem.gt_offsets = integer_input(a.gt_offsets);
  if (a.weights.has_value()) {
    align(*a.weights);
    problem.weights = anchor_input(*a.weights);
  }
  problem.batch_size = batch_size;
  problem.num_anchors = num_anchors;
  problem.num_gt = a.gt_boxes.size(0);
}

struct BoxLossArguments : PositivesArguments {
  std::optional<std::vector<double>> box_coder;
  int64_t loss;
  double alpha, gamma, beta;
};

inline BoxLossProblem box_loss_problem(BoxLossArguments& a) {
  BoxLossProblem problem{};
  fill_positives(a, 4, problem);
  if (a.box_coder.has_value()) {
    check_box_coder(*a.box_coder);
  }
  if (a.loss < 0 || a.loss >= kNumBoxLosses) {
    fail("loss: expected a number from 0 to ", kNumBoxLosses - 1, ", got ", a.loss);
  }
  check_number("alpha", a.alpha, 0.0, kMaxNumber, "a finite number above 0");
  check_number("gamma", a.gamma, 0.0, kMaxNumber, "a finite number above 0");
  check_number("beta", a.beta, 0.0, kMaxNumber, "a finite number above 0");
  problem.decode = a.box_coder.has_value();
  if (problem.decode) {
    problem.coder = mg_ops::box_coder(*a.box_coder);
  }
  problem.loss = static_cast<BoxLoss>(a.loss);
  problem.alpha = static_cast<float>(a.alpha);
  problem.gamma = static_cast<float>(a.gamma);
  problem.beta = static_cast<float>(a.beta);
  problem.balance = static_cast<float>(std::expm1(a.gamma / a.alpha));
  return problem;
}

// `run` adds everything up into one float32 on the device of the predictions.
template <void (*run)(const BoxLossProblem& problem, const Tensor& predictions, float* loss)>
Tensor box_loss(Tensor predictions, Tensor anchors, Tensor match, Tensor gt_boxes, Tensor gt_offsets,
                std::optional<Tensor> weights, std::optional<std::vector<double>> box_coder, int64_t loss, double alpha,
                double gamma, double beta) {
  BoxLossArguments arguments{
      {predictions, anchors, match, gt_boxes, gt_offsets, weights}, box_coder, loss, alpha, gamma, beta};
  const BoxLossProblem problem = box_loss_problem(arguments);
  const Tensor sum = new_result(predictions, {}, ScalarType::Float);
  run(problem, predictions, static_cast<float*>(sum.mutable_data_ptr()));
  return sum;
}

// `run` writes the gradient of each prediction, times the number at `grad_output`: contiguous, in their dtype.
template <void (*run)(const BoxLossProblem& problem, const Tensor& predictions, const float* grad_output,
                      void* gradient)>
Tensor box_loss_backward(const Tensor& grad_output, Tensor predictions, Tensor anchors, Tensor match, Tensor gt_boxes,
                         Tensor gt_offsets, std::optional<Tensor> weights, std::optional<std::vector<double>> box_coder,
                         int64_t loss, double alpha, double gamma, double beta) {
  BoxLossArguments arguments{
      {predictions, anchors, match, gt_boxes, gt_offsets, weights}, box_coder, loss, alpha, gamma, beta};
  const BoxLossProblem problem = box_loss_problem(arguments);
  check_grad_output(grad_output, predictions);
  const Tensor gradient =
      new_result(predictions, {problem.batch_size, problem.num_anchors, 4}, predictions.scalar_type());
  run(problem, predictions, static_cast<const float*>(grad_output.const_data_ptr()), gradient.mutable_data_ptr());
  return gradient;
}

struct DistributionLossArguments : PositivesArguments {
  Tensor strides;
  double margin;
};

inline DistributionLossProblem distribution_loss_problem(DistributionLossArguments& a) {
  DistributionLossProblem problem{};
  const int64_t width = a.predictions.dim() == 3 ? a.predictions.size(2) : 0;
  if (width < 8 || width % 4 != 0) {
    fail("predictions: expected shape (B, A, 4 * bins) with 2 bins or more, got ", width, " numbers an anchor");
  }
  fill_positives(a, width, problem);
  check_tensor("strides", a.strides, Kind::kFloating, {problem.num_anchors}, a.predictions);
  check_from_zero("margin", a.margin, 1.0, "a number in [0, 1]");
  align(a.strides);
  problem.strides = {a.strides.const_data_ptr(), 0, a.strides.stride(0), 0, float_type(a.strides), false};
  problem.num_bins = width / 4;
  problem.margin = static_cast<float>(a.margin);
  return problem;
}

// `run` as of box_loss.
template <void (*run)(const DistributionLossProblem& problem, const Tensor& predictions, float* loss)>
Tensor distribution_loss(Tensor predictions, Tensor anchors, Tensor match, Tensor gt_boxes, Tensor gt_offsets,
                         std::optional<Tensor> weights, Tensor strides, double margin) {
  DistributionLossArguments arguments{{predictions, anchors, match, gt_boxes, gt_offsets, weights}, strides, margin};
  const DistributionLossProblem problem = distribution_loss_problem(arguments);
  const Tensor sum = new_result(predictions, {}, ScalarType::Float);
  run(problem, predictions, static_cast<float*>(sum.mutable_data_ptr()));
  return sum;
}

template <void (*run)(const DistributionLossProblem& problem, const Tensor& predictions, const float* grad_output,
                      void* gradient)>
Tensor distribution_loss_backward(const Tensor& grad_output, Tensor predictions, Tensor anchors, Tensor match,
                                  Tensor gt_boxes, Tensor gt_offsets, std::optional<Tensor> weights, Tensor strides,
                                  double margin) {
  DistributionLossArguments arguments{{predictions, anchors, match, gt_boxes, gt_offsets, weights}, strides, margin};
  const DistributionLossProblem problem = distribution_loss_problem(arguments);
  check_grad_output(grad_output, predictions);
  const Tensor gradient = new_result(predictions, {problem.batch_size, problem.num_anchors, 4 * problem.num_bins},
                                     predictions.scalar_type());
  run(problem, predictions, static_cast<const float*>(grad_output.const_data_ptr()), gradient.mutable_data_ptr());
  return gradient;
}

}  // namespace mg_ops
