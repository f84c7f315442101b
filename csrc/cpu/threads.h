// What the operators on the CPU share: work spread over torch's threads, and the check of the offsets.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

#include "../check.h"
#include "mutual_match_kernel.h"
#include "os.h"

namespace mg_ops {
namespace {

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
    if (!started) {
      work(first, stop);
    }
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

// Raises unless the offsets start at 0, never decrease and stay within the objects.
inline void check_offsets(const MatchProblem& problem) {
  int64_t previous = 0;
  for (int64_t i = 0; i <= problem.batch_size; ++i) {
    const int64_t offset = load_integer(problem.gt_offsets, i);
    if (i == 0 && offset != 0) {
      fail("gt_offsets: must start at 0, got ", offset);
    }
    if (offset < previous) {
      fail("gt_offsets: must not decrease, got ", previous, " then ", offset, " for image ", i - 1);
    }
    previous = offset;
  }
  if (previous > problem.num_gt) {
    fail("gt_offsets: must not exceed the ", problem.num_gt, " packed objects, got ", previous);
  }
}

}  // namespace
}  // namespace mg_ops
