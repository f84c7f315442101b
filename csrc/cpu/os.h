// What the CPU backend asks of the operating system: pages of memory, and whether this process was forked.
#pragma once

#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstddef>
#include <cstdint>

namespace mg_ops {
namespace {

// Brings the pages of fresh memory in with one system call: touched one by one, their page faults can cost as much as
// the whole matching. Memory that the allocator hands out again has its pages; the first one tells. Only advice: where
// the kernel (before Linux 5.14) does not know it, nothing changes.
inline void populate_pages(void* begin, size_t bytes) {
#if defined(__linux__)
#if !defined(MADV_POPULATE_WRITE)
  constexpr int MADV_POPULATE_WRITE = 23;
#endif
  static const uintptr_t page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page_size - 1) & ~(page_size - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) & ~(page_size - 1);
  unsigned char resident = 0;
  if (first >= last || (mincore(reinterpret_cast<void*>(first), page_size, &resident) == 0 && (resident & 1) != 0)) {
    return;
  }
  static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_POPULATE_WRITE));
#else
  static_cast<void>(begin), static_cast<void>(bytes);
#endif
}

// Large outputs are written whole, so they may as well come in huge pages, a five-hundredth of the page faults.
inline void advise_huge_pages(void* output, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(output);
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (begin + bytes) & ~(kHugePage - 1);
  if (first < last) {
    static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
  }
#else
  static_cast<void>(output), static_cast<void>(bytes);
#endif
}

// A process forked from one that has used torch's threads has none of them, but does not know: torch would wait for
// them forever. Data loaders and multiprocessing fork.
bool in_forked_process = false;
const int fork_is_noticed = pthread_atfork(nullptr, nullptr, [] { in_forked_process = true; });

}  // namespace
}  // namespace mg_ops
