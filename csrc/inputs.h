// From tensors to what the kernels take, and new tensors for their results.
#pragma once

#include <algorithm>
#include <vector>

#include "check.h"
#include "problem.h"

namespace mg_ops {

inline FloatType float_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return FloatType::kFloat16;
    case ScalarType::BFloat16: return FloatType::kBFloat16;
    case ScalarType::Double: return FloatType::kFloat64;
    default: return FloatType::kFloat32;
  }
}

// Rows of a tensor of two or three dimensions, read through its strides.
inline FloatInput float_input(const Tensor& tensor) {
  const bool batched = tensor.dim() == 3;
  FloatInput input{};
  input.data = tensor.const_data_ptr();
  input.image_stride = batched ? tensor.stride(0) : 0;
  input.row_stride = tensor.stride(batched ? 1 : 0);
  input.column_stride = tensor.stride(batched ? 2 : 1);
  input.type = float_type(tensor);
  const size_t load_bytes = std::min<size_t>(16, 4 * tensor.element_size());
  input.whole_rows = tensor.size(tensor.dim() - 1) == 4 && input.column_stride == 1 && input.row_stride % 4 == 0 &&
                     input.image_stride % 4 == 0 && reinterpret_cast<uintptr_t>(input.data) % load_bytes == 0;
  return input;
}

// One number an anchor, (B, A).
inline FloatInput anchor_input(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), 0, float_type(tensor), false};
}

inline IntegerInput integer_input(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.scalar_type() == ScalarType::Long};
}

// Of five numbers that check_box_coder has passed.
inline BoxCoder box_coder(const std::vector<double>& numbers) {
  const auto number = [&](size_t i) { return static_cast<float>(numbers[i]); };
  return {number(0), number(1), number(2), number(3), number(4)};
}

// Raises unless this is an int64 tensor of the shape, on the device of another one.
inline void check_int64_tensor(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                               const Tensor& other) {
  check_tensor(name, tensor, Kind::kInteger, shape, other);
  if (tensor.scalar_type() != ScalarType::Long) {
    fail(name, ": expected dtype int64, got ", torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Raises unless this is what autograd hands to the backward of a float32 number.
inline void check_grad_output(const Tensor& grad_output, const Tensor& other) {
  check_tensor("grad_output", grad_output, Kind::kFloating, {}, other);
  if (grad_output.scalar_type() != ScalarType::Float) {
    fail("grad_output: expected dtype float32, got ", torch::headeronly::toString(grad_output.scalar_type()));
  }
}

// Replaces a tensor that starts between two numbers, as one over another library's buffer can, by a copy: C++ must not
// read it there, and a GPU cannot.
inline void align(Tensor& tensor) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  if (begin % tensor.element_size() != 0) {
    tensor = torch::stable::clone(tensor);
  }
}

inline Tensor new_result(const Tensor& anchors, std::initializer_list<int64_t> shape, ScalarType dtype) {
  try {
    return torch::stable::new_empty(anchors, shape, dtype);
  } catch (const std::exception&) {
    fail("mg_ops: not enough memory for a result of shape ", shape_text(shape.begin(), shape.size()));
  }
}

}  // namespace mg_ops
