// Argument checks of the operators, the guard of the process's memory: an operator can be called by itself, from
// torch.ops or an exported program, and wrong input must never crash the process. Whatever is thrown here reaches
// Python as a RuntimeError with this message; mg_ops/checks.py states the same rules for the operators written in
// Python.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace mg_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::runtime_error of the parts, written one after the other.
template <typename... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

enum class Kind { kFloating, kInteger, kBool };

inline const char* dtype_names(Kind kind) {
  switch (kind) {
    case Kind::kFloating: return "float16, bfloat16, float32 or float64";
    case Kind::kInteger: return "int64 or int32";
    default: return "bool";
  }
}

inline bool is_of_kind(ScalarType dtype, Kind kind) {
  switch (kind) {
    case Kind::kFloating:
      return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
             dtype == ScalarType::Double;
    case Kind::kInteger: return dtype == ScalarType::Long || dtype == ScalarType::Int;
    default: return dtype == ScalarType::Bool;
  }
}

constexpr int64_t kAnySize = -1;

// "(2, 100, 4)"; any size is shown as "any".
inline std::string shape_text(const int64_t* sizes, size_t dim) {
  std::ostringstream text;
  text << "(";
  for (size_t d = 0; d < dim; ++d) {
    text << (d == 0 ? "" : ", ");
    sizes[d] == kAnySize ? text << "any" : text << sizes[d];
  }
  text << (dim == 1 ? ",)" : ")");
  return text.str();
}

// Whether the tensor's memory holds all its elements. Frameworks that shard parameters resize it away in between.
inline bool is_readable(const Tensor& tensor) {
  int64_t num_bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &num_bytes));
  int64_t last = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) == 0) {
      return true;
    }
    last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  return last < num_bytes / static_cast<int64_t>(tensor.element_size());
}

// Raises unless the tensor is of this kind and shape and on the device of `anchors`.
inline void check_tensor(const char* name, const Tensor& tensor, Kind kind, std::initializer_list<int64_t> shape,
                         const Tensor& anchors) {
  if (!tensor.defined()) {
    fail(name, ": expected a tensor, got None");
  }
  if (!is_of_kind(tensor.scalar_type(), kind)) {
    fail(name, ": expected dtype ", dtype_names(kind), ", got ", torch::headeronly::toString(tensor.scalar_type()));
  }
  const int64_t dim = tensor.dim();
  bool fits = dim == static_cast<int64_t>(shape.size());
  for (int64_t d = 0; fits && d < dim; ++d) {
    const int64_t expected = shape.begin()[d];
    fits = expected == kAnySize || expected == tensor.size(d);
  }
  if (!fits) {
    fail(name, ": expected shape ", shape_text(shape.begin(), shape.size()), ", got ",
         shape_text(tensor.sizes().data(), static_cast<size_t>(dim)));
  }
  if (tensor.is_cuda() != anchors.is_cuda() || tensor.is_cpu() != anchors.is_cpu() ||
      tensor.get_device_index() != anchors.get_device_index()) {
    fail(name, ": expected the device of anchors, got another one: move all arguments to one device");
  }
  if (!is_readable(tensor)) {
    fail(name, ": its memory does not hold what its shape and strides say; has its storage been resized or freed?");
  }
}

// What every number of a call must be: low < value <= high, as given and as the normal float32 it is rounded to.
inline bool is_in_range(double value, double low, double high) {
  const float rounded = static_cast<float>(value);
  return value <= high && rounded > static_cast<float>(low) && rounded >= std::numeric_limits<float>::min();
}

inline void check_number(const char* name, double value, double low, double high, const char* expected) {
  if (!is_in_range(value, low, high)) {
    fail(name, ": expected ", expected, ", got ", value);
  }
}

// The same of a number that may also be 0.
inline void check_from_zero(const char* name, double value, double high, const char* expected) {
  if (value != 0.0) {
    check_number(name, value, 0.0, high, expected);
  }
}

inline void check_count(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    fail(name, ": expected an integer from ", low, " to ", high, ", got ", value);
  }
}

constexpr double kMaxNumber = std::numeric_limits<float>::max();

// Raises unless these are the four weights and the clip of a box coder.
inline void check_box_coder(const std::vector<double>& box_coder) {
  if (box_coder.size() != 5) {
    fail("box_coder: expected five numbers, the weights of x, y, w and h and the clip, got ", box_coder.size());
  }
  for (size_t i = 0; i < 4; ++i) {
    if (!is_in_range(std::abs(box_coder[i]), 0.0, kMaxNumber)) {
      fail("box_coder: expected weights that are finite numbers other than 0, got ", box_coder[i]);
    }
  }
  if (std::isnan(box_coder[4])) {
    fail("box_coder: expected a number as clip, got NaN");
  }
}

// Raises unless the tensors are as csrc/schema.cpp says, but for the values in them.
inline void check_match_tensors(const Tensor& anchors, const Tensor& pred_boxes, const Tensor& cls_scores,
                                const Tensor& gt_boxes, const Tensor& gt_labels, const Tensor& gt_offsets,
                                const std::optional<Tensor>& gt_crowd) {
  check_tensor("anchors", anchors, Kind::kFloating, {kAnySize, 4}, anchors);
  const int64_t num_anchors = anchors.size(0);
  check_tensor("cls_scores", cls_scores, Kind::kFloating, {kAnySize, num_anchors, kAnySize}, anchors);
  const int64_t batch_size = cls_scores.size(0);
  check_tensor("pred_boxes", pred_boxes, Kind::kFloating, {batch_size, num_anchors, 4}, anchors);
  check_tensor("gt_boxes", gt_boxes, Kind::kFloating, {kAnySize, 4}, anchors);
  const int64_t num_gt = gt_boxes.size(0);
  check_tensor("gt_labels", gt_labels, Kind::kInteger, {num_gt}, anchors);
  check_tensor("gt_offsets", gt_offsets, Kind::kInteger, {batch_size + 1}, anchors);
  if (gt_crowd.has_value()) {
    check_tensor("gt_crowd", *gt_crowd, Kind::kBool, {num_gt}, anchors);
  }
  // Kernels count anchors and objects in 32 bits.
  constexpr int64_t kMaxCount = std::numeric_limits<int32_t>::max();
  if (num_anchors > kMaxCount || num_gt > kMaxCount) {
    fail("mutual_match: expected at most ", kMaxCount, " anchors and objects, got ", num_anchors, " and ", num_gt);
  }
}

// Raises unless the numbers are as csrc/schema.cpp says.
inline void check_iou_thresholds(double iou_positive, double iou_ignored, double crowd_overlap) {
  check_number("iou_positive", iou_positive, 0.0, 1.0, "a threshold in (0, 1]");
  check_number("iou_ignored", iou_ignored, 0.0, 1.0, "a threshold in (0, 1]");
  check_number("crowd_overlap", crowd_overlap, 0.0, 1.0, "a threshold in (0, 1]");
  if (iou_ignored > iou_positive) {
    fail("iou_ignored: must not exceed iou_positive (", iou_positive, "), got ", iou_ignored);
  }
}

inline void check_match_numbers(double sigma, double iou_positive, double iou_ignored, double crowd_overlap) {
  check_number("sigma", sigma, 1.0, kMaxNumber, "a finite number above 1");
  check_iou_thresholds(iou_positive, iou_ignored, crowd_overlap);
}

}  // namespace mg_ops
