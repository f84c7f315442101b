// The torch-free headers on NumPy arrays, for tests only: the module `mg_ops_headers`.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "../csrc/assignment.h"
#include "../csrc/power.h"

namespace {

namespace py = pybind11;
template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

constexpr py::ssize_t kBoxSize = 4;

const mg_ops::Box* boxes_of(const Array<float>& array, const char* name) {
  static_assert(sizeof(mg_ops::Box) == kBoxSize * sizeof(float), "a Box is four packed floats");
  if (array.ndim() != 2 || array.shape(1) != kBoxSize) {
    throw py::value_error(std::string(name) + ": expected shape (M, 4)");
  }
  return reinterpret_cast<const mg_ops::Box*>(array.data());
}

template <typename Result, typename Argument, typename Function>
py::array_t<Result> map_elements(const Array<Argument>& x, Function function) {
  py::array_t<Result> result(x.size());
  const Argument* in = x.data();
  Result* out = result.mutable_data();
  for (py::ssize_t i = 0; i < x.size(); ++i) {
    out[i] = function(in[i]);
  }
  return result;
}

py::array_t<float> det_exp(const Array<float>& x) {
  return map_elements<float, float>(x, [](float v) { return mg_ops::det_exp(v); });
}

py::array_t<float> det_log2(const Array<float>& x) {
  return map_elements<float, float>(x, [](float v) { return mg_ops::det_log2(v); });
}

py::array_t<float> det_log1p(const Array<float>& x) {
  return map_elements<float, float>(x, [](float v) { return mg_ops::det_log1p(v); });
}

py::array_t<float> det_exp10(const Array<float>& x) {
  return map_elements<float, float>(x, [](float v) { return mg_ops::det_exp10(v); });
}

py::array_t<float> det_sigmoid(const Array<float>& x) {
  return map_elements<float, float>(x, [](float v) { return mg_ops::det_sigmoid(v); });
}

py::array_t<float> class_probability(const Array<float>& scores, bool is_probability) {
  return map_elements<float, float>(scores, [=](float v) { return mg_ops::class_probability(v, is_probability); });
}

// log2_q and p: (M,).
py::array_t<float> amplified_exponent(const Array<float>& log2_q, const Array<float>& p, float sigma) {
  if (log2_q.size() != p.size()) {
    throw py::value_error("p: expected as many as log2_q");
  }
  py::array_t<float> result(p.size());
  for (py::ssize_t i = 0; i < p.size(); ++i) {
    result.mutable_data()[i] = mg_ops::amplified_exponent(log2_q.data()[i], p.data()[i], sigma);
  }
  return result;
}

// (M, 4) and (G, 4) -> (M, G), as the kernels do it: anything not finite is the empty box.
py::array_t<float> box_iou(const Array<float>& boxes_1, const Array<float>& boxes_2) {
  const mg_ops::Box* first = boxes_of(boxes_1, "boxes_1");
  const mg_ops::Box* second = boxes_of(boxes_2, "boxes_2");
  py::array_t<float> result({boxes_1.shape(0), boxes_2.shape(0)});
  float* out = result.mutable_data();
  for (py::ssize_t i = 0; i < boxes_1.shape(0); ++i) {
    const mg_ops::Box a = mg_ops::finite_or_empty(first[i]);
    for (py::ssize_t j = 0; j < boxes_2.shape(0); ++j) {
      const mg_ops::Box b = mg_ops::finite_or_empty(second[j]);
      *out++ = mg_ops::box_iou(a, mg_ops::box_area(a), b, mg_ops::box_area(b));
    }
  }
  return result;
}

py::array_t<bool> is_object(const Array<float>& boxes) {
  const mg_ops::Box* box = boxes_of(boxes, "boxes");
  py::array_t<bool> result(boxes.shape(0));
  for (py::ssize_t i = 0; i < boxes.shape(0); ++i) {
    result.mutable_data()[i] = mg_ops::is_object(box[i]);
  }
  return result;
}

// anchors (M, 4) moved by deltas (M, 4) -> (M, 4).
py::array_t<float> decode_box(const Array<float>& anchors, const Array<float>& deltas, float weight_x, float weight_y,
                              float weight_w, float weight_h, float clip) {
  const mg_ops::Box* anchor = boxes_of(anchors, "anchors");
  const mg_ops::Box* delta = boxes_of(deltas, "deltas");
  if (anchors.shape(0) != deltas.shape(0)) {
    throw py::value_error("deltas: expected as many as anchors");
  }
  const mg_ops::BoxCoder coder = {weight_x, weight_y, weight_w, weight_h, clip};
  py::array_t<float> result({anchors.shape(0), kBoxSize});
  mg_ops::Box* out = reinterpret_cast<mg_ops::Box*>(result.mutable_data());
  for (py::ssize_t i = 0; i < anchors.shape(0); ++i) {
    out[i] = mg_ops::decode_box(anchor[i], delta[i].x1, delta[i].y1, delta[i].x2, delta[i].y2, coder);
  }
  return result;
}

py::array_t<uint32_t> iou_order(const Array<float>& q) {
  return map_elements<uint32_t, float>(q, [](float v) { return mg_ops::iou_order(v); });
}

py::array_t<uint32_t> exponent_order(const Array<float>& exponent) {
  return map_elements<uint32_t, float>(exponent, [](float v) { return mg_ops::exponent_order(v); });
}

// orders and indices: (M,).
py::array_t<uint64_t> claim_key(const Array<uint32_t>& orders, const Array<uint32_t>& indices) {
  if (orders.size() != indices.size()) {
    throw py::value_error("indices: expected as many as orders");
  }
  py::array_t<uint64_t> result(orders.size());
  for (py::ssize_t i = 0; i < orders.size(); ++i) {
    result.mutable_data()[i] = mg_ops::claim_key(orders.data()[i], indices.data()[i]);
  }
  return result;
}

py::array_t<uint32_t> key_index(const Array<uint64_t>& keys) {
  return map_elements<uint32_t, uint64_t>(keys, [](uint64_t key) { return mg_ops::key_index(key); });
}

py::array_t<uint32_t> key_order(const Array<uint64_t>& keys) {
  return map_elements<uint32_t, uint64_t>(keys, [](uint64_t key) { return mg_ops::key_order(key); });
}

}  // namespace

PYBIND11_MODULE(mg_ops_headers, module) {
  module.doc() = "csrc/det_math.h, box.h and assignment.h on NumPy arrays; elementwise functions return shape (size,).";
  module.attr("FORCED_IOU_ORDER") = mg_ops::kForcedIouOrder;
  module.attr("FORCED_EXPONENT_ORDER") = mg_ops::kForcedExponentOrder;
  module.attr("BACKGROUND") = mg_ops::kBackground;
  module.attr("IGNORED") = mg_ops::kIgnored;
  module.def("det_exp", &det_exp, py::arg("x"));
  module.def("det_log2", &det_log2, py::arg("x"));
  module.def("det_log1p", &det_log1p, py::arg("x"));
  module.def("det_exp10", &det_exp10, py::arg("x"));
  module.def("det_sigmoid", &det_sigmoid, py::arg("x"));
  module.def("class_probability", &class_probability, py::arg("scores"), py::arg("is_probability"));
  module.def("amplified_exponent", &amplified_exponent, py::arg("log2_q"), py::arg("p"), py::arg("sigma"));
  module.def("box_iou", &box_iou, py::arg("boxes_1"), py::arg("boxes_2"));
  module.def("is_object", &is_object, py::arg("boxes"));
  module.def("decode_box", &decode_box, py::arg("anchors"), py::arg("deltas"), py::arg("weight_x"), py::arg("weight_y"),
             py::arg("weight_w"), py::arg("weight_h"), py::arg("clip"));
  module.def("iou_order", &iou_order, py::arg("q"));
  module.def("exponent_order", &exponent_order, py::arg("exponent"));
  module.def("claim_key", &claim_key, py::arg("orders"), py::arg("indices"));
  module.def("key_index", &key_index, py::arg("keys"));
  module.def("key_order", &key_order, py::arg("keys"));
}
