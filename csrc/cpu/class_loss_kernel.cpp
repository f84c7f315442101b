// The classification losses on the CPU. The logits of a chunk are brought to float32 in a buffer, where those that are
// no negatives - an anchor's label, and all classes of an ignored anchor - are replaced by a logit whose loss is 0.
// What is left is one loop without branches; the labels follow one by one.
//
// Loops marked "vector loop" are those the time goes to; tests/test_vector_loops.py asks the compiler about them.
// Everything here has internal linkage, see mutual_match_kernel.cpp.
#ifndef MG_OPS_CPU_TARGET
#define MG_OPS_CPU_TARGET baseline
#endif

#include "class_loss_kernel.h"

#include <type_traits>

#include "float_types.h"

namespace mg_ops {
namespace MG_OPS_CPU_TARGET {
namespace {

constexpr int64_t kLanes = 16;  // of the widest vectors; sums have as many parts with narrower ones
static_assert(kChunkLogits % kLanes == 0, "chunks are padded to whole vectors");

// A label in the buffer of a chunk: where, and what its logit was.
struct Label {
  int64_t place;
  float logit, target;
};

// The logits of a chunk as negatives, and the labels among them.
struct Chunk {
  int64_t image, first_anchor, num_anchors, first_class, num_classes;
  int64_t num_labels = 0;
  Label labels[kChunkLogits];
  alignas(64) float logits[kChunkLogits];

  Chunk(const ClassLossProblem& problem, const ClassLossChunks& chunks, int64_t index) {
    image = index / chunks.per_image;
    const int64_t in_image = index % chunks.per_image;
    first_anchor = in_image / chunks.per_anchors * chunks.anchors;
    first_class = in_image % chunks.per_anchors * chunks.classes;
    const int64_t anchors_left = problem.num_anchors - first_anchor, classes_left = problem.num_classes - first_class;
    num_anchors = anchors_left < chunks.anchors ? anchors_left : chunks.anchors;
    num_classes = classes_left < chunks.classes ? classes_left : chunks.classes;
    load_logits(problem.logits);
    take_out_labels(problem);
  }

  int64_t num_logits() const { return num_anchors * num_classes; }

 private:
  void load_logits(const FloatInput& input) {
    with_type(input, [&](auto* data) {
      const int64_t anchor_stride = input.row_stride, class_stride = input.column_stride;
      const auto* first = data + image * input.image_stride + first_anchor * anchor_stride + first_class * class_stride;
      const int64_t count = num_logits(), columns = num_classes;
      if (class_stride == 1 && anchor_stride == columns) {
        for (int64_t i = 0; i < count; ++i) {  // vector loop
          logits[i] = to_float(first[i]);
        }
      } else if (class_stride == 1) {
        for (int64_t anchor = 0; anchor < num_anchors; ++anchor) {
          for (int64_t i = 0; i < columns; ++i) {
            logits[anchor * columns + i] = to_float(first[anchor * anchor_stride + i]);
          }
        }
      } else {  // heads write classes as channels: the anchors of a class are neighbors in memory
        for (int64_t i = 0; i < columns; ++i) {
          for (int64_t anchor = 0; anchor < num_anchors; ++anchor) {
            logits[anchor * columns + i] = to_float(first[anchor * anchor_stride + i * class_stride]);
          }
        }
      }
      for (int64_t i = count; i % kLanes != 0; ++i) {
        logits[i] = kNeverPositive;
      }
    });
  }

  void take_out_labels(const ClassLossProblem& problem) {
    const FloatInput& targets = problem.soft_targets;
    for (int64_t i = 0; i < num_anchors; ++i) {
      const int64_t anchor = first_anchor + i;
      const int64_t label = problem.class_targets[image * problem.target_image_stride + anchor * problem.target_stride];
      const int64_t place = i * num_classes + label - first_class;
      if (label < kBackground || label >= problem.num_classes) {  // ignored
        for (int64_t j = i * num_classes; j < (i + 1) * num_classes; ++j) {
          logits[j] = kNeverPositive;
        }
      } else if (label >= first_class && label < first_class + num_classes) {
        const float target = targets.data == nullptr
                                 ? 1.0f
                                 : load_float(targets, image * targets.image_stride + anchor * targets.row_stride);
        if (target != 0.0f) {
          labels[num_labels++] = {place, logits[place], target};
          logits[place] = kNeverPositive;
        }
      }
    }
  }
};

// Calls f with the exponent as a constant.
template <class Function>
static auto with_exponent(float gamma, Function f) {
  switch (exponent_of(gamma)) {
    case Exponent::kZero: return f(std::integral_constant<Exponent, Exponent::kZero>());
    case Exponent::kOne: return f(std::integral_constant<Exponent, Exponent::kOne>());
    case Exponent::kTwo: return f(std::integral_constant<Exponent, Exponent::kTwo>());
    default: return f(std::integral_constant<Exponent, Exponent::kAny>());
  }
}

template <Exponent exponent>
static double sum_negatives(const float* logits, int64_t count, float gamma) {
  float sums[kLanes] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {  // vector loop
      sums[lane] += negative_loss<exponent>(logits[i + lane], gamma);
    }
  }
  double sum = 0.0;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum += static_cast<double>(sums[lane]);
  }
  return sum;
}

static double loss(const ClassLossProblem& problem, const ClassLossChunks& chunks, int64_t index) {
  const DefaultFloatEnvironment environment;
  const ClassLossParams& params = problem.params;
  const Chunk chunk(problem, chunks, index);
  double at_labels = 0.0;
  for (int64_t i = 0; i < chunk.num_labels; ++i) {
    at_labels += static_cast<double>(positive_loss(chunk.labels[i].logit, chunk.labels[i].target, params).loss);
  }
  const double negatives = with_exponent(params.negative_gamma, [&](auto exponent) {
    return sum_negatives<decltype(exponent)::value>(chunk.logits, chunk.num_logits(), params.negative_gamma);
  });
  return at_labels + static_cast<double>(params.negative_weight) * negatives;
}

template <Exponent exponent>
static void differentiate_negatives(float* logits, int64_t count, float gamma, float scale) {
  for (int64_t i = 0; i < count; ++i) {  // vector loop
    logits[i] = scale * negative_gradient<exponent>(logits[i], gamma);
  }
}

static void gradient(const ClassLossProblem& problem, const ClassLossChunks& chunks, int64_t index, float scale,
                     void* output) {
  const DefaultFloatEnvironment environment;
  const ClassLossParams& params = problem.params;
  Chunk chunk(problem, chunks, index);
  with_exponent(params.negative_gamma, [&](auto exponent) {
    differentiate_negatives<decltype(exponent)::value>(chunk.logits, chunk.num_logits(), params.negative_gamma,
                                                       scale * params.negative_weight);
  });
  for (int64_t i = 0; i < chunk.num_labels; ++i) {
    const Label& label = chunk.labels[i];
    chunk.logits[label.place] = scale * positive_loss(label.logit, label.target, params).gradient;
  }
  const int64_t first =
      (chunk.image * problem.num_anchors + chunk.first_anchor) * problem.num_classes + chunk.first_class;
  store_floats(chunk.logits, chunk.num_logits(), problem.logits.type, output, first);
}

}  // namespace

ClassLossKernels class_loss_kernels() { return {loss, gradient}; }

}  // namespace MG_OPS_CPU_TARGET
}  // namespace mg_ops
