// mg_ops::mutual_match on the CPU: picks the kernels for this processor and spreads the images over threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include "../mutual_match.h"
#include "instruction_set.h"
#include "mutual_match_kernel.h"
#include "offsets.h"
#include "os.h"
#include "threads.h"

namespace mg_ops {
namespace {

// Anchors are brought into tiles once a call where this many images share them; fewer images do it on the fly, and the
// memory beyond the outputs stays within the stated bound.
constexpr int64_t kShareAnchorTilesFrom = 4;

const MatchKernels& kernels() {
  static const MatchKernels chosen = MG_OPS_FOR_THIS_PROCESSOR(match_kernels());
  return chosen;
}

// The rows of an image's results, about to be written.
void populate_rows(const MatchProblem& problem, int64_t image) {
  const size_t bytes = static_cast<size_t>(problem.num_anchors) * sizeof(int64_t);
  populate_pages(problem.cls_match + image * problem.num_anchors, bytes);
  populate_pages(problem.loc_match + image * problem.num_anchors, bytes);
}

using Work = std::unique_ptr<ImageWork, void (*)(ImageWork*)>;

// Enough images for all threads: each thread takes one image after another. False: out of memory.
bool match_images(const MatchProblem& problem, const BoxTile* anchor_tiles, int64_t num_tiles, int64_t num_threads) {
  const MatchKernels& run = kernels();
  // Those with most objects first: what is left when the first thread runs out of images is then small.
  std::vector<int64_t> order(static_cast<size_t>(problem.batch_size));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return load_integer(problem.gt_offsets, a + 1) - load_integer(problem.gt_offsets, a) >
           load_integer(problem.gt_offsets, b + 1) - load_integer(problem.gt_offsets, b);
  });
  std::atomic<int64_t> next_image{0};
  std::atomic<bool> enough_memory{true};
  share_out(0, num_threads, [&](int64_t, int64_t) {
    const Work work(run.create_work(problem, anchor_tiles), run.destroy_work);
    if (work == nullptr) {
      enough_memory = false;
    }
    while (enough_memory) {
      const int64_t place = next_image++;
      if (place >= problem.batch_size) {
        break;
      }
      const int64_t image = order[static_cast<size_t>(place)];
      populate_rows(problem, image);
      if (!run.begin_image(*work, image)) {
        enough_memory = false;
      }
      if (!enough_memory) {
        break;
      }
      run.claim_by_anchors(*work, 0, num_tiles);
      if (!run.finish_claim_by_anchors(*work)) {
        enough_memory = false;
      }
      if (!enough_memory) {
        break;
      }
      run.claim_by_regressed(*work, 0, num_tiles);
      run.finish_claim_by_regressed(*work);
      run.claim_by_amplified(*work, 0, num_tiles);
      run.finish_claim_by_amplified(*work);
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
    if (works.back() == nullptr || !run.begin_image(*works.back(), image)) {
      return false;
    }
  }
  const auto for_images = [&](auto step) {
    share_out(0, problem.batch_size, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        step(*works[static_cast<size_t>(image)]);
      }
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
    if (!run.finish_claim_by_anchors(work)) {
      enough_memory = false;
    }
  });
  if (!enough_memory) {
    return false;
  }
  for_tiles(run.claim_by_regressed);
  for_images(run.finish_claim_by_regressed);
  for_tiles(run.claim_by_amplified);
  for_images(run.finish_claim_by_amplified);
  return true;
}

void mutual_match_cpu(const MatchProblem& problem, const Tensor&) {
  check_offsets(problem.gt_offsets, problem.batch_size, problem.num_gt);
  if (problem.num_gt > 0) {
    std::memset(problem.num_pos, 0, static_cast<size_t>(problem.num_gt) * sizeof(int32_t));
    std::memset(problem.num_total, 0, static_cast<size_t>(problem.num_gt) * sizeof(int32_t));
  }
  if (problem.batch_size == 0 || problem.num_anchors == 0) {
    return;
  }

  const size_t match_bytes = static_cast<size_t>(problem.batch_size * problem.num_anchors) * sizeof(int64_t);
  advise_huge_pages(problem.cls_match, match_bytes);
  advise_huge_pages(problem.loc_match, match_bytes);
  const int64_t num_tiles = (problem.num_anchors + kTileSize - 1) / kTileSize;
  std::unique_ptr<BoxTile[]> anchor_tiles;
  if (problem.batch_size >= kShareAnchorTilesFrom) {
    anchor_tiles.reset(new BoxTile[static_cast<size_t>(num_tiles)]);
    share_out(0, num_tiles, [&](int64_t begin, int64_t end) {
      kernels().load_anchor_tiles(problem, begin, end, anchor_tiles.get());
    });
  }
  const int64_t num_threads = torch::stable::get_num_threads();
  const bool enough_memory = problem.batch_size >= num_threads
                                 ? match_images(problem, anchor_tiles.get(), num_tiles, num_threads)
                                 : match_split_images(problem, anchor_tiles.get(), num_tiles);
  if (!enough_memory) {
    fail("mutual_match: not enough memory for ", problem.batch_size, " images of ", problem.num_anchors, " anchors");
  }
}

STABLE_TORCH_LIBRARY_IMPL(mg_ops, CPU, m) { m.impl("mutual_match", TORCH_BOX(&mutual_match<mutual_match_cpu>)); }

}  // namespace
}  // namespace mg_ops
