// The box losses of dense detectors at one positive anchor, and their gradients. mg_ops/losses.py has the eager
// definition. No torch in here.
#pragma once

#include "assignment.h"
#include "dual.h"
#include "problem.h"

namespace mg_ops {

enum class BoxLoss : int64_t { kSmoothL1, kBalancedL1, kReleasedBalancedL1, kGiou, kCiou };
constexpr int64_t kNumBoxLosses = 5;

// B images, A anchors, N objects in all.
struct PositivesProblem {
  FloatInput predictions;                    // (B, A, ...)
  FloatInput anchors;                        // (A, 4)
  const int64_t* match;                      // (B, A) the object of a positive within its image; else below 0
  int64_t match_image_stride, match_stride;  // of match
  FloatInput gt_boxes;                       // (N, 4)
  IntegerInput gt_offsets;                   // (B + 1,)
  FloatInput weights;                        // (B, A) of the positives; without data all weigh 1
  int64_t batch_size, num_anchors, num_gt;
};

struct BoxLossProblem : PositivesProblem {  // of predictions (B, A, 4): boxes, or deltas where `decode`
  bool decode;
  BoxCoder coder;
  BoxLoss loss;
  float alpha, gamma, beta;  // of the L1 losses
  float balance;             // exp(gamma / alpha) - 1
};

// The distribution focal loss (Li et al., NeurIPS 2020, equation 6) of predictions (B, A, 4 * num_bins): the logits of
// the distances from an anchor's center to the left, top, right and bottom side of its object.
struct DistributionLossProblem : PositivesProblem {
  FloatInput strides;  // (A,) as of one image: how long a bin is
  int64_t num_bins;
  float margin;  // distances are clamped to num_bins - 1 - margin
};

// A loss, and its derivatives with respect to the four predicted numbers.
struct LossAndSlopes {
  float loss;
  float slopes[4];
};

// The deltas that decode_box turns into the box: its inverse but for the clip.
MG_OPS_INLINE Box encode_box(const Box& anchor, const Box& box, const BoxCoder& coder) {
  const float anchor_w = anchor.x2 - anchor.x1, anchor_h = anchor.y2 - anchor.y1;
  const float w = box.x2 - box.x1, h = box.y2 - box.y1;
  const float dx = (box.x1 + 0.5f * w) - (anchor.x1 + 0.5f * anchor_w);
  const float dy = (box.y1 + 0.5f * h) - (anchor.y1 + 0.5f * anchor_h);
  return {coder.weight_x * (dx / anchor_w), coder.weight_y * (dy / anchor_h), coder.weight_w * logf(w / anchor_w),
          coder.weight_h * logf(h / anchor_h)};
}

// Of the size of one coordinate's error: the loss and its derivative.
struct LossAndSlope {
  float loss, slope;
};

MG_OPS_INLINE LossAndSlope l1_loss(const BoxLossProblem& problem, float x) {
  const float alpha = problem.alpha, gamma = problem.gamma, beta = problem.beta, b = problem.balance;
  if (problem.loss == BoxLoss::kSmoothL1) {
    return x < beta ? LossAndSlope{0.5f * x * x / beta, x / beta} : LossAndSlope{x - 0.5f * beta, 1.0f};
  }
  const float log_ratio = log1pf(b * x / beta);
  if (problem.loss == BoxLoss::kBalancedL1) {
    return x < beta
               ? LossAndSlope{alpha * (beta / b) * (b * x / beta + 1.0f) * log_ratio - alpha * x, alpha * log_ratio}
               : LossAndSlope{gamma * x + (gamma / b - alpha) * beta, gamma};
  }
  return x < beta ? LossAndSlope{alpha / b * (b * x + 1.0f) * log_ratio - alpha * x,
                                 alpha * (log_ratio + (b * x + 1.0f) / (b * x + beta) - 1.0f)}
                  : LossAndSlope{gamma * x + gamma / b - alpha * beta, gamma};
}

// The predicted box as a function of the four predicted numbers.
struct DualBox {
  Dual x1, y1, x2, y2;
};

MG_OPS_INLINE void decode_dual_interval(float first, float second, float delta_center, float delta_size, int number,
                                        float weight_center, float weight_size, float clip, Dual& low, Dual& high) {
  const float size = second - first;
  const Dual center = (size / weight_center) * variable(delta_center, number) + (first + 0.5f * size);
  const float log_scale = delta_size / weight_size;
  const Dual log_size = log_scale > clip ? constant(clip) : (1.0f / weight_size) * variable(delta_size, number + 2);
  const Dual half = (0.5f * size) * exponential(log_size);
  low = center - half;
  high = center + half;
}

MG_OPS_INLINE DualBox predicted_box(const BoxLossProblem& problem, const Box& anchor, const Box& predicted) {
  DualBox box{};
  if (problem.decode) {
    const BoxCoder& coder = problem.coder;
    decode_dual_interval(anchor.x1, anchor.x2, predicted.x1, predicted.x2, 0, coder.weight_x, coder.weight_w,
                         coder.clip, box.x1, box.x2);
    decode_dual_interval(anchor.y1, anchor.y2, predicted.y1, predicted.y2, 1, coder.weight_y, coder.weight_h,
                         coder.clip, box.y1, box.y2);
  } else {
    box = {variable(predicted.x1, 0), variable(predicted.y1, 1), variable(predicted.x2, 2), variable(predicted.y2, 3)};
  }
  return box;
}

// 1 - GIoU (Rezatofighi et al., CVPR 2019) or 1 - CIoU (Zheng et al., AAAI 2020), as torchvision computes them.
MG_OPS_INLINE Dual iou_loss(bool complete, const DualBox& a, const Box& b) {
  constexpr float kEpsilon = 1e-7f;
  const Dual w = a.x2 - a.x1, h = a.y2 - a.y1;
  const float b_w = b.x2 - b.x1, b_h = b.y2 - b.y1;
  const Dual overlap_w = smaller(a.x2, constant(b.x2)) - larger(a.x1, constant(b.x1));
  const Dual overlap_h = smaller(a.y2, constant(b.y2)) - larger(a.y1, constant(b.y1));
  const bool overlap = overlap_w.value > 0.0f && overlap_h.value > 0.0f;
  const Dual intersection = overlap ? overlap_w * overlap_h : constant(0.0f);
  const Dual joined = (w * h + b_w * b_h) - intersection;
  const Dual iou = intersection / (joined + kEpsilon);
  const Dual around_w = larger(a.x2, constant(b.x2)) - smaller(a.x1, constant(b.x1));
  const Dual around_h = larger(a.y2, constant(b.y2)) - smaller(a.y1, constant(b.y1));
  if (!complete) {
    const Dual around = around_w * around_h;
    return (1.0f - iou) + (around - joined) / (around + kEpsilon);
  }
  const Dual shift_x = 0.5f * (a.x1 + a.x2) + -0.5f * (b.x1 + b.x2);
  const Dual shift_y = 0.5f * (a.y1 + a.y2) + -0.5f * (b.y1 + b.y2);
  const Dual distance =
      (shift_x * shift_x + shift_y * shift_y) / ((around_w * around_w + around_h * around_h) + kEpsilon);
  const Dual turn = atanf(b_w / b_h) - arctangent(w / h);
  const Dual shape = 0.405284735f * (turn * turn);                                      // 4 / pi^2
  const float trade_off = shape.value / ((1.0f - iou.value) + shape.value + kEpsilon);  // not differentiated
  return ((1.0f - iou) + distance) + trade_off * shape;
}

// The loss of a positive, unweighted.
MG_OPS_INLINE LossAndSlopes box_loss_of(const BoxLossProblem& problem, const Box& anchor, const Box& predicted,
                                        const Box& gt_box) {
  if (problem.loss == BoxLoss::kGiou || problem.loss == BoxLoss::kCiou) {
    const Dual loss = iou_loss(problem.loss == BoxLoss::kCiou, predicted_box(problem, anchor, predicted), gt_box);
    return {loss.value, {loss.slopes[0], loss.slopes[1], loss.slopes[2], loss.slopes[3]}};
  }
  const Box target = problem.decode ? encode_box(anchor, gt_box, problem.coder) : gt_box;
  const float errors[4] = {predicted.x1 - target.x1, predicted.y1 - target.y1, predicted.x2 - target.x2,
                           predicted.y2 - target.y2};
  LossAndSlopes sum{};
  for (int i = 0; i < 4; ++i) {
    const LossAndSlope part = l1_loss(problem, errors[i] < 0.0f ? -errors[i] : errors[i]);
    sum.loss += part.loss;
    sum.slopes[i] = errors[i] < 0.0f ? -part.slope : errors[i] > 0.0f ? part.slope : errors[i] * 0.0f;
  }
  return sum;
}

// The two neighboring bins that a side's distance falls between.
struct Bins {
  int64_t low;
  float upper;  // the weight of bin low + 1; that of bin low is 1 - upper
};

MG_OPS_INLINE Bins bins_of(const DistributionLossProblem& problem, const Box& anchor, const Box& gt_box, float stride,
                           int64_t side) {
  const float center = 0.5f * (side % 2 == 0 ? anchor.x1 + anchor.x2 : anchor.y1 + anchor.y2);
  const float distance = side == 0   ? center - gt_box.x1
                         : side == 1 ? center - gt_box.y1
                         : side == 2 ? gt_box.x2 - center
                                     : gt_box.y2 - center;
  const float bins = distance / stride, most = static_cast<float>(problem.num_bins - 1) - problem.margin;
  const float clamped = !(bins > 0.0f) ? 0.0f : bins < most ? bins : most;  // NaN counts as 0
  const int64_t whole = static_cast<int64_t>(clamped), last = problem.num_bins - 2;
  const int64_t low = whole < last ? whole : last;
  return {low, clamped - static_cast<float>(low)};
}

// What the softmax over the bins of a side needs; `logit(bin)` reads one.
struct Softmax {
  float most, sum;  // the largest logit, and the sum of exp(logit - most)
};

template <class Logit>
MG_OPS_INLINE Softmax softmax_of(int64_t num_bins, Logit logit) {
  float most = logit(int64_t{0});
  for (int64_t bin = 1; bin < num_bins; ++bin) {
    const float x = logit(bin);
    most = x > most ? x : most;
  }
  float sum = 0.0f;
  for (int64_t bin = 0; bin < num_bins; ++bin) {
    sum += det_exp(logit(bin) - most);
  }
  return {most, sum};
}

// The loss of a side, unweighted, and its derivative with respect to the logit of a bin.
template <class Logit>
MG_OPS_INLINE float distribution_loss_of(const Bins& bins, const Softmax& softmax, Logit logit) {
  const float at_low = logit(bins.low) - softmax.most, at_upper = logit(bins.low + 1) - softmax.most;
  return logf(softmax.sum) - ((1.0f - bins.upper) * at_low + bins.upper * at_upper);
}

MG_OPS_INLINE float distribution_slope_of(const Bins& bins, const Softmax& softmax, int64_t bin, float logit) {
  const float wanted = bin == bins.low ? 1.0f - bins.upper : bin == bins.low + 1 ? bins.upper : 0.0f;
  return det_exp(logit - softmax.most) / softmax.sum - wanted;
}

}  // namespace mg_ops
