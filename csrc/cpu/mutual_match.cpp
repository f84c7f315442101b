// mg_ops::mutual_match on the CPU: reads the tensors' layout, allocates the outputs, and spreads the images over
// threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <thread>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/mutual_match_kernel.h"

namespace mg_ops {
namespace {

// Anchors are brought into tiles once a call where this many images share them; fewer images do it on the fly, and the
// memory beyond the outputs stays within the stated bound.
constexpr int64_t kShareAnchorTilesFrom = 4;

// The widest instruction set this processor runs.
const MatchKernels& kernels() {
  static const MatchKernels chosen = [] {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq")) {
      return avx512::match_kernels();
    }
    if (__builtin_cpu_supports("avx2")) return avx2::match_kernels();
#endif
    return baseline::match_kernels();
  }();
  return chosen;
}

FloatType float_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return FloatType::kFloat16;
    case ScalarType::BFloat16: return FloatType::kBFloat16;
    case ScalarType::Double: return FloatType::kFloat64;
    default: return FloatType::kFloat32;
  }
}

// A (..., 4)-like tensor of two or three dimensions, read through its strides.
FloatArray float_array(const Tensor& tensor) {
  const bool batched = tensor.dim() == 3;
  return {tensor.const_data_ptr(),
          float_type(tensor),
          {batched ? tensor.stride(0) : 0, tensor.stride(batched ? 1 : 0), tensor.stride(batched ? 2 : 1)}};
}

IntArray int_array(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.scalar_type() == ScalarType::Long, tensor.stride(0)};
}

Tensor new_output(const Tensor& anchors, std::initializer_list<int64_t> shape, ScalarType dtype) {
  try {
    return torch::stable::new_empty(anchors, shape, dtype);
  } catch (const std::exception&) {
    fail("mutual_match: not enough memory for a result of shape ", shape_text(shape.begin(), shape.size()));
  }
}

// Brings the pages of fresh memory in with one system call: touched one by one, their page faults can cost as much as
// the whole matching. Memory that the allocator hands out again has its pages; the first one tells. Only advice: where
// the kernel (before Linux 5.14) does not know it, nothing changes.
void populate_pages(void* begin, size_t bytes) {
#if defined(__linux__)
#if !defined(MADV_POPULATE_WRITE)
  constexpr int MADV_POPULATE_WRITE = 23;
#endif
  static const uintptr_t page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page_size - 1) & ~(page_size - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) & ~(page_size - 1);
  unsigned char resident = 0;
  if (first >= last || (mincore(reinterpret_cast<void*>(first), page_size, &resident) == 0 && (resident & 1) != 0))
    return;
  static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_POPULATE_WRITE));
#else
  static_cast<void>(begin), static_cast<void>(bytes);
#endif
}

// Large outputs are written whole, so they may as well come in huge pages, a five-hundredth of the page faults.
void advise_huge_pages(const Tensor& output) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(output.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (begin + static_cast<uintptr_t>(output.numel()) * sizeof(int64_t)) & ~(kHugePage - 1);
  if (first < last) static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
#else
  static_cast<void>(output);
#endif
}

// The rows of an image's results, about to be written.
void populate_rows(const MatchProblem& problem, int64_t image) {
  const size_t bytes = static_cast<size_t>(problem.num_anchors) * sizeof(int64_t);
  populate_pages(problem.cls_match + image * problem.num_anchors, bytes);
  populate_pages(problem.loc_match + image * problem.num_anchors, bytes);
}

// A process forked from one that has used torch's threads has none of them, but does not know: torch would wait for
// them forever. Data loaders and multiprocessing fork.
bool in_forked_process = false;
const int fork_is_noticed = pthread_atfork(nullptr, nullptr, [] { in_forked_process = true; });

// Calls work(begin, end) for parts of this range, on as many threads as torch uses.
template <typename Function>
void share_out(int64_t begin, int64_t end, const Function& work) {
#ifndef MG_OPS_OWN_THREADS
  if (!in_forked_process) {
    torch::stable::parallel_for(begin, end, 1, work);
    return;
  }
#endif
  const int64_t num_parts = std::min<int64_t>(end - begin, torch::stable::get_num_threads());
  std::vector<std::thread> threads;
  for (int64_t part = 0; part < num_parts; ++part) {
    const int64_t first = begin + (end - begin) * part / num_parts;
    const int64_t stop = begin + (end - begin) * (part + 1) / num_parts;
    bool started = false;
    if (part + 1 < num_parts) {
      try {
        threads.emplace_back([&work, first, stop] { work(first, stop); });
        started = true;
      } catch (const std::exception&) {  // no thread to be had: the work is done here
      }
    }
    if (!started) work(first, stop);
  }
  for (std::thread& thread : threads) thread.join();
}

using Work = std::unique_ptr<ImageWork, void (*)(ImageWork*)>;

// Enough images for all threads: each thread takes one image after another. False: out of memory.
bool match_images(const MatchProblem& problem, const BoxTile* anchor_tiles, int64_t num_tiles, int64_t num_threads) {
  const MatchKernels& run = kernels();
  // Those with most objects first: what is left when the first thread runs out of images is then small.
  std::vector<int64_t> order(static_cast<size_t>(problem.batch_size));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return problem.gt_offsets[a + 1] - problem.gt_offsets[a] > problem.gt_offsets[b + 1] - problem.gt_offsets[b];
  });
  std::atomic<int64_t> next_image{0};
  std::atomic<bool> enough_memory{true};
  share_out(0, num_threads, [&](int64_t, int64_t) {
    const Work work(run.create_work(problem, anchor_tiles), run.destroy_work);
    if (work == nullptr) enough_memory = false;
    while (enough_memory) {
      const int64_t place = next_image++;
      if (place >= problem.batch_size) break;
      const int64_t image = order[static_cast<size_t>(place)];
      populate_rows(problem, image);
      if (!run.begin_image(*work, image)) enough_memory = false;
      if (!enough_memory) break;
      run.claim_by_anchors(*work, 0, num_tiles);
      if (!run.count_positives(*work)) enough_memory = false;
      if (!enough_memory) break;
      run.claim_by_regressed(*work, 0, num_tiles);
      run.label_classification(*work);
      run.claim_by_amplified(*work, 0, num_tiles);
      run.label_localization(*work);
    }
  });
  return enough_memory;
}

// Fewer images than threads: all images are in work at once, and their tiles are shared out. False: out of memory.
bool match_split_images(const MatchProblem& problem, const BoxTile* anchor_tiles, int64_t num_tiles) {
  const MatchKernels& run = kernels();
  std::vector<Work> works;
  for (int64_t image = 0; image < problem.batch_size; ++image) {
    works.emplace_back(run.create_work(problem, anchor_tiles), run.destroy_work);
    populate_rows(problem, image);
    if (works.back() == nullptr || !run.begin_image(*works.back(), image)) return false;
  }
  const auto for_images = [&](auto step) {
    share_out(0, problem.batch_size, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) step(*works[static_cast<size_t>(image)]);
    });
  };
  // The tiles of all images are one range, which the threads divide evenly.
  const auto for_tiles = [&](auto step) {
    share_out(0, problem.batch_size * num_tiles, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t image = begin / num_tiles, first = image * num_tiles;
        const int64_t stop = std::min(end, first + num_tiles);
        step(*works[static_cast<size_t>(image)], begin - first, stop - first);
        begin = stop;
      }
    });
  };
  std::atomic<bool> enough_memory{true};
  for_tiles(run.claim_by_anchors);
  for_images([&](ImageWork& work) {
    if (!run.count_positives(work)) enough_memory = false;
  });
  if (!enough_memory) return false;
  for_tiles(run.claim_by_regressed);
  for_images(run.label_classification);
  for_tiles(run.claim_by_amplified);
  for_images(run.label_localization);
  return true;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mutual_match_cpu(
    Tensor anchors, Tensor pred_boxes, Tensor cls_scores, Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets,
    const std::optional<Tensor>& gt_crowd, const std::optional<std::vector<double>>& box_coder,
    bool classification_by_regressed, bool localization_by_amplified, double sigma, double iou_positive,
    double iou_ignored, double crowd_overlap) {
  const MatchSizes sizes = check_match_arguments(anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets,
                                                 gt_crowd, box_coder, sigma, iou_positive, iou_ignored, crowd_overlap);
  align({&anchors, &pred_boxes, &cls_scores, &gt_boxes, &gt_labels, &gt_offsets});
  check_offsets(gt_offsets, sizes.num_gt);

  const Tensor cls_match = new_output(anchors, {sizes.batch_size, sizes.num_anchors}, ScalarType::Long);
  const Tensor loc_match = new_output(anchors, {sizes.batch_size, sizes.num_anchors}, ScalarType::Long);
  const Tensor num_pos = new_output(anchors, {sizes.num_gt}, ScalarType::Int);
  const Tensor num_total = new_output(anchors, {sizes.num_gt}, ScalarType::Int);
  if (sizes.num_gt > 0) {
    std::memset(num_pos.mutable_data_ptr(), 0, static_cast<size_t>(sizes.num_gt) * sizeof(int32_t));
    std::memset(num_total.mutable_data_ptr(), 0, static_cast<size_t>(sizes.num_gt) * sizeof(int32_t));
  }
  if (sizes.batch_size == 0 || sizes.num_anchors == 0) return {cls_match, loc_match, num_pos, num_total};

  advise_huge_pages(cls_match);
  advise_huge_pages(loc_match);
  const MatchProblem problem = {
      sizes.batch_size,
      sizes.num_anchors,
      sizes.num_classes,
      float_array(anchors),
      float_array(pred_boxes),
      float_array(cls_scores),
      float_array(gt_boxes),
      int_array(gt_labels),
      int_array(gt_offsets),
      gt_crowd.has_value() ? gt_crowd->const_data_ptr<bool>() : nullptr,
      gt_crowd.has_value() ? gt_crowd->stride(0) : 0,
      box_coder.has_value(),
      box_coder_of(box_coder),
      {classification_by_regressed, localization_by_amplified, static_cast<float>(sigma),
       static_cast<float>(iou_positive), static_cast<float>(iou_ignored), static_cast<float>(crowd_overlap)},
      cls_match.mutable_data_ptr<int64_t>(),
      loc_match.mutable_data_ptr<int64_t>(),
      num_pos.mutable_data_ptr<int32_t>(),
      num_total.mutable_data_ptr<int32_t>(),
  };

  const int64_t num_tiles = (sizes.num_anchors + kTileSize - 1) / kTileSize;
  std::unique_ptr<BoxTile[]> anchor_tiles;
  if (sizes.batch_size >= kShareAnchorTilesFrom) {
    anchor_tiles.reset(new BoxTile[static_cast<size_t>(num_tiles)]);
    share_out(0, num_tiles, [&](int64_t begin, int64_t end) {
      kernels().load_anchor_tiles(problem, begin, end, anchor_tiles.get());
    });
  }
  const int64_t num_threads = torch::stable::get_num_threads();
  const bool enough_memory = sizes.batch_size >= num_threads
                                 ? match_images(problem, anchor_tiles.get(), num_tiles, num_threads)
                                 : match_split_images(problem, anchor_tiles.get(), num_tiles);
  if (!enough_memory)
    fail("mutual_match: not enough memory for ", sizes.batch_size, " images of ", sizes.num_anchors, " anchors");
  return {cls_match, loc_match, num_pos, num_total};
}

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CPU, m) { m.impl("mutual_match", TORCH_BOX(&mutual_match_cpu)); }

}  // namespace
}  // namespace mg_ops
