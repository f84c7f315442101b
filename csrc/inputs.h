// From tensors to what the kernels take, and new tensors for their results.
#pragma once

#include <algorithm>

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

inline IntegerInput integer_input(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.scalar_type() == ScalarType::Long};
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
