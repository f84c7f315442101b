// mg_ops::class_loss and its backward on the CPU: picks the kernels for this processor and spreads the chunks over
// threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>

#include "../class_loss_op.h"
#include "class_loss_kernel.h"
#include "instruction_set.h"
#include "threads.h"

namespace mg_ops {
namespace {

const ClassLossKernels& kernels() {
  static const ClassLossKernels chosen = MG_OPS_FOR_THIS_PROCESSOR(class_loss_kernels());
  return chosen;
}

bool has_logits(const ClassLossProblem& problem) {
  return problem.batch_size > 0 && problem.num_anchors > 0 && problem.num_classes > 0;
}

void class_loss_cpu(const ClassLossProblem& problem, const Tensor&, float* loss) {
  double sum = 0.0;
  if (has_logits(problem)) {
    const ClassLossChunks chunks = chunks_of(problem);
    const int64_t num_chunks = problem.batch_size * chunks.per_image;
    const std::unique_ptr<double[]> sums(new double[static_cast<size_t>(num_chunks)]);
    share_out(0, num_chunks, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        sums[static_cast<size_t>(chunk)] = kernels().loss(problem, chunks, chunk);
      }
    });
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {  // in one order, whatever the threads did
      sum += sums[static_cast<size_t>(chunk)];
    }
  }
  *loss = static_cast<float>(sum);
}

void class_loss_backward_cpu(const ClassLossProblem& problem, const Tensor&, const float* grad_output, void* gradient) {
  if (!has_logits(problem)) {
    return;
  }
  const ClassLossChunks chunks = chunks_of(problem);
  const int64_t num_logits = problem.batch_size * problem.num_anchors * problem.num_classes;
  advise_huge_pages(gradient, static_cast<size_t>(num_logits * bytes_of(problem.logits.type)));
  share_out(0, problem.batch_size * chunks.per_image, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      kernels().gradient(problem, chunks, chunk, *grad_output, gradient);
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CPU, m) {
  m.impl("class_loss", TORCH_BOX(&class_loss<class_loss_cpu>));
  m.impl("class_loss_backward", TORCH_BOX(&class_loss_backward<class_loss_backward_cpu>));
}

}  // namespace
}  // namespace mg_ops
