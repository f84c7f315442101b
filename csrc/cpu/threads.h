// Work on as many threads as torch uses.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

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

}  // namespace
}  // namespace mg_ops
