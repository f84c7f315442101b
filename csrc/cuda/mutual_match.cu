// mg_ops::mutual_match on CUDA tensors: reads the tensors' layout, allocates the outputs and one block of scratch, and
// launches on the caller's device and stream. Nothing is read back, and nothing waits for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "../check.h"
#include "launch.h"
#include "mutual_match_kernels.cuh"

namespace mg_ops::cuda {
namespace {

// Floating rows of a tensor of two or three dimensions, read through its strides.
FloatInput float_input(const Tensor& tensor) {
  const bool batched = tensor.dim() == 3;
  FloatInput input{};
  input.data = tensor.const_data_ptr();
  input.image_stride = batched ? tensor.stride(0) : 0;
  input.row_stride = tensor.stride(batched ? 1 : 0);
  input.column_stride = tensor.stride(batched ? 2 : 1);
  size_t number_bytes = 0;
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      input.type = FloatType::kFloat16;
      number_bytes = 2;
      break;
    case ScalarType::BFloat16:
      input.type = FloatType::kBFloat16;
      number_bytes = 2;
      break;
    case ScalarType::Double:
      input.type = FloatType::kFloat64;
      number_bytes = 8;
      break;
    default: input.type = FloatType::kFloat32; number_bytes = 4;
  }
  const size_t load_bytes = std::min<size_t>(16, 4 * number_bytes);
  input.whole_rows = tensor.size(tensor.dim() - 1) == 4 && input.column_stride == 1 && input.row_stride % 4 == 0 &&
                     input.image_stride % 4 == 0 && reinterpret_cast<uintptr_t>(input.data) % load_bytes == 0;
  return input;
}

IntegerInput integer_input(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.scalar_type() == ScalarType::Long};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mutual_match_cuda(
    Tensor anchors, Tensor pred_boxes, Tensor cls_scores, Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets,
    const std::optional<Tensor>& gt_crowd, bool decode, double weight_x, double weight_y, double weight_w,
    double weight_h, double clip, bool classification_by_regressed, bool localization_by_amplified, double sigma,
    double iou_positive, double iou_ignored, double crowd_overlap) {
  const MatchSizes sizes = check_match_arguments(anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets,
                                                 gt_crowd, decode, weight_x, weight_y, weight_w, weight_h, clip, sigma,
                                                 iou_positive, iou_ignored, crowd_overlap);
  align({&anchors, &pred_boxes, &cls_scores, &gt_boxes, &gt_labels, &gt_offsets});
  // Blocks are numbered in 31 bits, classes too.
  constexpr int64_t kMaxCount = std::numeric_limits<int32_t>::max();
  if (sizes.num_anchors > 0 && sizes.batch_size > kMaxCount / (sizes.num_anchors / kThreads + 1)) {
    fail("mutual_match: expected at most ", kMaxCount, " blocks of ", kThreads, " anchors, got ", sizes.batch_size,
         " images of ", sizes.num_anchors, " anchors: split the batch");
  }
  if (sizes.num_classes > kMaxCount) {
    fail("cls_scores: expected at most ", kMaxCount, " classes, got ", sizes.num_classes);
  }

  const torch::stable::accelerator::DeviceGuard guard(anchors.get_device_index());
  const Tensor cls_match = torch::stable::new_empty(anchors, {sizes.batch_size, sizes.num_anchors}, ScalarType::Long);
  const Tensor loc_match = torch::stable::new_empty(anchors, {sizes.batch_size, sizes.num_anchors}, ScalarType::Long);
  const Tensor num_pos = torch::stable::new_empty(anchors, {sizes.num_gt}, ScalarType::Int);
  const Tensor num_total = torch::stable::new_empty(anchors, {sizes.num_gt}, ScalarType::Int);

  MatchProblem problem{};
  problem.anchors = float_input(anchors);
  problem.pred_boxes = float_input(pred_boxes);
  problem.cls_scores = float_input(cls_scores);
  problem.gt_boxes = float_input(gt_boxes);
  problem.gt_labels = integer_input(gt_labels);
  problem.gt_offsets = integer_input(gt_offsets);
  if (gt_crowd.has_value()) {
    problem.gt_crowd = static_cast<const uint8_t*>(gt_crowd->const_data_ptr());
    problem.crowd_stride = gt_crowd->stride(0);
  }
  problem.batch_size = sizes.batch_size;
  problem.num_anchors = sizes.num_anchors;
  problem.num_classes = sizes.num_classes;
  problem.num_gt = sizes.num_gt;
  problem.decode = decode;
  problem.coder = {static_cast<float>(weight_x), static_cast<float>(weight_y), static_cast<float>(weight_w),
                   static_cast<float>(weight_h), static_cast<float>(clip)};
  problem.params = {classification_by_regressed,     localization_by_amplified,
                    static_cast<float>(sigma),       static_cast<float>(iou_positive),
                    static_cast<float>(iou_ignored), static_cast<float>(crowd_overlap)};
  problem.cls_match = static_cast<int64_t*>(cls_match.mutable_data_ptr());
  problem.loc_match = static_cast<int64_t*>(loc_match.mutable_data_ptr());
  problem.num_pos = static_cast<int32_t*>(num_pos.mutable_data_ptr());
  problem.num_total = static_cast<int32_t*>(num_total.mutable_data_ptr());
  // Released when this returns, which torch's allocator allows: later work on this stream comes after the kernels.
  const int64_t scratch_bytes = static_cast<int64_t>(place_scratch(problem, nullptr));
  const Tensor scratch = torch::stable::new_empty(anchors, {scratch_bytes}, ScalarType::Byte);
  place_scratch(problem, static_cast<char*>(scratch.mutable_data_ptr()));

  const cudaStream_t stream = current_stream(anchors);
  launch_mutual_match(problem, [&](int64_t grid, auto kernel) {
    kernel<<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(problem);
    check_launch("mutual_match");
  });
  return {cls_match, loc_match, num_pos, num_total};
}

}  // namespace
}  // namespace mg_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CUDA, m) { m.impl("mutual_match", TORCH_BOX(&mg_ops::cuda::mutual_match_cuda)); }
