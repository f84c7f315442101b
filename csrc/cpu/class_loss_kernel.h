// What the CPU kernels of the classification losses take and offer; no torch here. Compiled once for each instruction
// set, like rule_kernels.h.
#pragma once

#include "../class_loss.h"

namespace mg_ops {

// Logits are handled in chunks that fit into the first-level cache: some anchors of an image with all their classes, or
// one anchor with some of them. They do not depend on the number of threads, so sums are the same on every machine.
constexpr int64_t kChunkLogits = 2048;

struct ClassLossChunks {
  int64_t anchors, classes;        // of a chunk, the last ones have fewer
  int64_t per_anchors, per_image;  // chunks
};

inline ClassLossChunks chunks_of(const ClassLossProblem& problem) {
  ClassLossChunks chunks{};
  chunks.classes = problem.num_classes < kChunkLogits ? problem.num_classes : kChunkLogits;
  chunks.anchors = kChunkLogits / chunks.classes;
  chunks.per_anchors = (problem.num_classes + chunks.classes - 1) / chunks.classes;
  chunks.per_image = (problem.num_anchors + chunks.anchors - 1) / chunks.anchors * chunks.per_anchors;
  return chunks;
}

// Of a problem with at least one logit.
struct ClassLossKernels {
  // The losses of a chunk, added up.
  double (*loss)(const ClassLossProblem&, const ClassLossChunks&, int64_t chunk);
  // Their gradients times `scale`, at their places in the whole (B, A, C) gradient.
  void (*gradient)(const ClassLossProblem&, const ClassLossChunks&, int64_t chunk, float scale, void* gradient);
};

namespace baseline {
ClassLossKernels class_loss_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
ClassLossKernels class_loss_kernels();
}
namespace avx512 {
ClassLossKernels class_loss_kernels();
}
#endif

}  // namespace mg_ops
