// Runs the steps of a rule's CPU kernels for a batch, the images or their tiles spread over threads.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "../mutual_match.h"
#include "offsets.h"
#include "rule_kernels.h"
#include "threads.h"

namespace mg_ops {
namespace {

// The rows of an image's results, about to be written. A rule with one match for both tasks has no loc_match.
inline void populate_rows(const MatchProblem& problem, int64_t image) {
  const size_t bytes = static_cast<size_t>(problem.num_anchors) * sizeof(int64_t);
  for (int64_t* match : {problem.cls_match, problem.loc_match}) {
    if (match != nullptr) {
      populate_pages(match + image * problem.num_anchors, bytes);
    }
  }
}

using RuleWork = std::unique_ptr<ImageWork, void (*)(ImageWork*)>;

// Enough images for all threads: each thread takes one image after another. False: out of memory.
inline bool run_images(const RuleKernels& kernels, const MatchProblem& problem, const BoxTile* anchor_tiles,
                       int64_t num_tiles, int64_t num_threads) {
  // Those with most objects first: what is left when the first thread runs out of images is then small.
  const auto num_objects = [&](int64_t image) {
    return load_integer(problem.gt_offsets, image + 1) - load_integer(problem.gt_offsets, image);
  };
  std::vector<int64_t> order(static_cast<size_t>(problem.batch_size));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return num_objects(a) > num_objects(b); });
  std::atomic<int64_t> next_image{0};
  std::atomic<bool> enough_memory{true};
  share_out(0, num_threads, [&](int64_t, int64_t) {
    const RuleWork work(kernels.create_work(problem, anchor_tiles), kernels.destroy_work);
    bool enough = work != nullptr;
    while (enough && enough_memory) {
      const int64_t place = next_image++;
      if (place >= problem.batch_size) {
        break;
      }
      const int64_t image = order[static_cast<size_t>(place)];
      populate_rows(problem, image);
      enough = kernels.begin_image(*work, image);
      for (const RuleStep* step = kernels.steps; enough && !step->is_end(); ++step) {
        if (step->for_tiles != nullptr) {
          step->for_tiles(*work, 0, num_tiles);
        } else if (step->for_slots != nullptr) {
          step->for_slots(*work, 0, kernels.count_slots(*work));
        } else {
          enough = step->for_image(*work);
        }
      }
    }
    if (!enough) {
      enough_memory = false;
    }
  });
  return enough_memory;
}

// Fewer images than threads: all images are in work at once, and their tiles are shared out. False: out of memory.
inline bool run_split_images(const RuleKernels& kernels, const MatchProblem& problem, const BoxTile* anchor_tiles,
                             int64_t num_tiles) {
  std::vector<RuleWork> works;
  for (int64_t image = 0; image < problem.batch_size; ++image) {
    works.emplace_back(kernels.create_work(problem, anchor_tiles), kernels.destroy_work);
    populate_rows(problem, image);
    if (works.back() == nullptr || !kernels.begin_image(*works.back(), image)) {
      return false;
    }
  }
  std::atomic<bool> enough_memory{true};
  for (const RuleStep* step = kernels.steps; !step->is_end(); ++step) {
    if (step->for_image != nullptr) {
      share_out(0, problem.batch_size, [&](int64_t begin, int64_t end) {
        for (int64_t image = begin; image < end; ++image) {
          if (!step->for_image(*works[static_cast<size_t>(image)])) {
            enough_memory = false;
          }
        }
      });
    } else if (step->for_slots != nullptr) {
      for (const RuleWork& work : works) {
        share_out(0, kernels.count_slots(*work),
                  [&](int64_t begin, int64_t end) { step->for_slots(*work, begin, end); });
      }
    } else {
      // The tiles of all images are one range, which the threads divide evenly.
      share_out(0, problem.batch_size * num_tiles, [&](int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t image = begin / num_tiles, first = image * num_tiles;
          const int64_t stop = std::min(end, first + num_tiles);
          step->for_tiles(*works[static_cast<size_t>(image)], begin - first, stop - first);
          begin = stop;
        }
      });
    }
    if (!enough_memory) {
      return false;
    }
  }
  return true;
}

// Writes the results of a problem whose memory is allocated; `operator_name` is for the message of an error.
inline void run_rule(const RuleKernels& kernels, const MatchProblem& problem, const char* operator_name) {
  check_offsets(problem.gt_offsets, problem.batch_size, problem.num_gt);
  for (int32_t* counts : {problem.num_pos, problem.num_total}) {
    if (counts != nullptr && problem.num_gt > 0) {
      std::memset(counts, 0, static_cast<size_t>(problem.num_gt) * sizeof(int32_t));
    }
  }
  if (problem.batch_size == 0 || problem.num_anchors == 0) {
    return;
  }
  for (int64_t* match : {problem.cls_match, problem.loc_match}) {
    if (match != nullptr) {
      advise_huge_pages(match, static_cast<size_t>(problem.batch_size * problem.num_anchors) * sizeof(int64_t));
    }
  }
  // Anchors are brought into tiles once a call where several images share them; fewer images do it on the fly, and the
  // memory beyond the outputs stays within the stated bound.
  constexpr int64_t kShareAnchorTilesFrom = 4;
  const int64_t num_tiles = (problem.num_anchors + kTileSize - 1) / kTileSize;
  std::unique_ptr<BoxTile[]> anchor_tiles;
  if (problem.batch_size >= kShareAnchorTilesFrom) {
    anchor_tiles.reset(new BoxTile[static_cast<size_t>(num_tiles)]);
    share_out(0, num_tiles,
              [&](int64_t begin, int64_t end) { kernels.load_anchor_tiles(problem, begin, end, anchor_tiles.get()); });
  }
  const int64_t num_threads = torch::stable::get_num_threads();
  const bool enough_memory = problem.batch_size >= num_threads
                                 ? run_images(kernels, problem, anchor_tiles.get(), num_tiles, num_threads)
                                 : run_split_images(kernels, problem, anchor_tiles.get(), num_tiles);
  if (!enough_memory) {
    fail(operator_name, ": not enough memory for ", problem.batch_size, " images of ", problem.num_anchors,
         " anchors, with ", problem.num_gt, " objects in all");
  }
}

}  // namespace
}  // namespace mg_ops
