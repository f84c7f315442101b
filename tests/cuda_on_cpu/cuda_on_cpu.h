// Runs CUDA kernels on the CPU, thread by thread, so that tests can look for races, deadlocks and reads out of bounds
// on a machine without a GPU. Include it before the kernels: it supplies the CUDA built-ins they use.
//
// The threads of a block are fibers. A scheduler runs one until it waits at a barrier or a warp operation (and now and
// then in between, at atomics and fences), then picks another at random, from any of a few blocks that are resident at
// once. A missing barrier therefore shows as a wrong answer for some seed. Blocks start in random order. Shared memory
// is filled with garbage before each block and allocated at its exact size, for AddressSanitizer.
//
// Reported as errors, with the launch abandoned: a barrier that not all threads of a block reach, a warp operation that
// not all named lanes reach or that they reach from different operations, and any other state in which nothing can run.
#pragma once

#pragma GCC diagnostic ignored "-Wclobbered"  // getcontext returns twice only where someone goes back to it

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

enum class WarpOperation { kNone, kSync, kShuffle, kBallot, kMatchAny, kReduce };

struct Block;

// A thread of a block.
struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  Block* block = nullptr;
  int thread = 0;
  char* stack = nullptr;
  void* sanitizer_stack = nullptr;
  bool started = false, finished = false;
  bool at_barrier = false;
  int barrier_result = 0;
  // The warp operation it waits in.
  WarpOperation operation = WarpOperation::kNone;
  uint32_t lanes = 0;
  uint64_t value = 0;
  uint64_t values[32];  // of the lanes that took part, once all have
};

struct Block {
  Index3 index;
  std::vector<std::unique_ptr<Fiber>> fibers;
  int finished = 0;
  // The block barrier that its threads gather at.
  int barrier_arrived = 0;
  int barrier_or = 0;
  int barrier_kind = 0;
  std::vector<void*> shared;  // one allocation a declaration

  ~Block() {
    for (void* memory : shared) {
      std::free(memory);
    }
  }
};

struct LaunchOptions {
  uint64_t seed = 0;
  int resident_blocks = 3;         // how many blocks run side by side
  double yield_probability = 0.2;  // how often an atomic or a fence lets another thread run
};

class Launch {
 public:
  Launch(Index3 grid, unsigned threads, std::function<void()> kernel, LaunchOptions options)
      : grid_(grid), threads_(threads), kernel_(std::move(kernel)), options_(options), random_(options.seed) {}

  ~Launch() {
    for (char* stack : stacks_) {
      std::free(stack);
    }
  }

  // Runs all blocks; throws what went wrong.
  void run() {
    current_launch() = this;
    std::vector<unsigned> order(grid_.x * grid_.y);
    for (unsigned i = 0; i < order.size(); ++i) {
      order[i] = i;
    }
    std::shuffle(order.begin(), order.end(), random_);
    size_t next = 0;
    while (next < order.size() || !blocks_.empty()) {
      while (next < order.size() && static_cast<int>(blocks_.size()) < options_.resident_blocks) {
        start_block(order[next++]);
      }
      if (runnable_.empty()) {
        fail(describe_deadlock());
      }
      const size_t pick = random_() % runnable_.size();
      std::swap(runnable_[pick], runnable_.back());
      Fiber* fiber = runnable_.back();
      runnable_.pop_back();
      resume(fiber);
      if (!error_.empty()) {
        fail(error_);
      }
      if (fiber->finished) {
        retire(fiber);
      }
    }
    current_launch() = nullptr;
  }

  static Launch*& current_launch() {
    static Launch* launch = nullptr;
    return launch;
  }

  Fiber* fiber() const { return fiber_; }
  Index3 grid() const { return grid_; }
  unsigned threads() const { return threads_; }

  // Lets others run, then goes on.
  void maybe_yield() {
    if (std::uniform_real_distribution<double>()(random_) < options_.yield_probability) {
      runnable_.push_back(fiber_);
      leave();
    }
  }

  // __syncthreads and its relatives: `kind` tells them apart.
  int block_barrier(int kind, int value) {
    Fiber* self = fiber_;
    Block* block = self->block;
    if (block->barrier_arrived != 0 && block->barrier_kind != kind) {
      abandon("threads of block " + std::to_string(block->index.x) + " meet at different kinds of barrier");
    }
    block->barrier_kind = kind;
    block->barrier_or |= value != 0 ? 1 : 0;
    if (++block->barrier_arrived == static_cast<int>(threads_)) {
      const int result = block->barrier_or;
      block->barrier_arrived = 0;
      block->barrier_or = 0;
      for (auto& other : block->fibers) {
        other->barrier_result = result;
        if (other.get() != self) {
          other->at_barrier = false;
          runnable_.push_back(other.get());
        }
      }
      runnable_.push_back(self);  // the last to arrive need not be the first to go on
      leave();
    } else {
      self->at_barrier = true;
      leave();
    }
    return self->barrier_result;
  }

  // Waits until all `lanes` of the warp are here with their values; the values by lane.
  const uint64_t* exchange(WarpOperation operation, uint32_t lanes, uint64_t value) {
    Fiber* self = fiber_;
    const int lane = self->thread % 32;
    const int warp_start = self->thread - lane;
    if ((lanes >> lane & 1) == 0) {
      abandon("a lane runs a warp operation whose mask does not name it");
    }
    self->operation = operation;
    self->lanes = lanes;
    self->value = value;
    auto& fibers = self->block->fibers;
    bool all_here = true;
    for (int other = 0; other < 32; ++other) {
      if ((lanes >> other & 1) == 0) {
        continue;
      }
      const int thread = warp_start + other;
      if (thread >= static_cast<int>(threads_) || fibers[thread]->finished) {
        abandon("a warp operation names a lane that has left the kernel");
      }
      const Fiber& there = *fibers[thread];
      if (there.operation == WarpOperation::kNone) {
        all_here = false;
      } else if (there.operation != operation || there.lanes != lanes) {
        abandon("lanes of one warp meet in different warp operations");
      }
    }
    if (all_here) {
      uint64_t values[32] = {};
      for (int other = 0; other < 32; ++other) {
        if ((lanes >> other & 1) != 0) {
          values[other] = fibers[warp_start + other]->value;
        }
      }
      for (int other = 0; other < 32; ++other) {
        if ((lanes >> other & 1) != 0) {
          Fiber* there = fibers[warp_start + other].get();
          std::memcpy(there->values, values, sizeof values);
          there->operation = WarpOperation::kNone;
          runnable_.push_back(there);
        }
      }
    }
    leave();
    return self->values;
  }

  // The shared memory that the declaration number `declaration` of the kernel stands for.
  void* shared_memory(size_t declaration, size_t bytes, Block* block) {
    while (block->shared.size() <= declaration) {
      void* memory = nullptr;
      if (posix_memalign(&memory, 128, bytes) != 0) {
        abandon("out of memory");
      }
      for (size_t i = 0; i < bytes; ++i) {
        static_cast<unsigned char*>(memory)[i] = static_cast<unsigned char>(random_());
      }
      block->shared.push_back(memory);
    }
    return block->shared[declaration];
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kStackBytes = 256 * 1024;
#else
  static constexpr size_t kStackBytes = 64 * 1024;
#endif

  [[noreturn]] void fail(const std::string& what) {
    current_launch() = nullptr;
    throw std::runtime_error(what);
  }

  // From inside a fiber: gives up the launch.
  void abandon(const std::string& what) {
    error_ = what;
    leave();
    std::abort();  // never resumed
  }

  std::string describe_deadlock() const {
    for (const auto& block : blocks_) {
      int at_barrier = 0, in_warp_operation = 0;
      for (const auto& fiber : block->fibers) {
        at_barrier += fiber->at_barrier ? 1 : 0;
        in_warp_operation += fiber->operation != WarpOperation::kNone ? 1 : 0;
      }
      if (at_barrier + in_warp_operation > 0) {
        return "deadlock in block " + std::to_string(block->index.x) + ": of " + std::to_string(threads_) +
               " threads " + std::to_string(at_barrier) + " wait at a barrier, " + std::to_string(in_warp_operation) +
               " in a warp operation, " + std::to_string(block->finished) + " have left the kernel";
      }
    }
    return "deadlock";
  }

  void start_block(unsigned number) {
    auto block = std::make_unique<Block>();
    block->index = {number % grid_.x, number / grid_.x, 0};
    for (unsigned thread = 0; thread < threads_; ++thread) {
      auto fiber = std::make_unique<Fiber>();
      fiber->block = block.get();
      fiber->thread = static_cast<int>(thread);
      if (free_stacks_.empty()) {
        stacks_.push_back(static_cast<char*>(std::malloc(kStackBytes)));
        free_stacks_.push_back(stacks_.back());
      }
      fiber->stack = free_stacks_.back();
      free_stacks_.pop_back();
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = fiber->stack;
      fiber->context.uc_stack.ss_size = kStackBytes;
      fiber->context.uc_link = nullptr;
      makecontext(&fiber->context, &Launch::enter_fiber, 0);
      runnable_.push_back(fiber.get());
      block->fibers.push_back(std::move(fiber));
    }
    blocks_.push_back(std::move(block));
  }

  void retire(Fiber* fiber) {
    free_stacks_.push_back(fiber->stack);
    Block* block = fiber->block;
    if (++block->finished < static_cast<int>(threads_)) {
      return;
    }
    blocks_.erase(std::find_if(blocks_.begin(), blocks_.end(),
                               [&](const std::unique_ptr<Block>& other) { return other.get() == block; }));
  }

  static void enter_fiber() {
    Launch* launch = current_launch();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &launch->scheduler_bottom_, &launch->scheduler_size_);
#endif
    launch->kernel_();
    launch->fiber_->finished = true;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, launch->scheduler_bottom_, launch->scheduler_size_);
    setcontext(&launch->scheduler_context_);
#else
    _longjmp(launch->scheduler_jump_, 1);
#endif
  }

  // A context starts a fiber; after that jumps switch, which unlike contexts cost no system call. AddressSanitizer
  // takes jumps for returns, and gets contexts throughout.
  void resume(Fiber* fiber) {
    fiber_ = fiber;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber->stack, kStackBytes);
    swapcontext(&scheduler_context_, &fiber->context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    if (_setjmp(scheduler_jump_) == 0) {
      if (fiber->started) {
        _longjmp(fiber->jump, 1);
      }
      fiber->started = true;
      setcontext(&fiber->context);
    }
#endif
    fiber_ = nullptr;
  }

  // From inside a fiber: back to the scheduler.
  void leave() {
#if defined(__SANITIZE_ADDRESS__)
    Fiber* self = fiber_;
    __sanitizer_start_switch_fiber(&self->sanitizer_stack, scheduler_bottom_, scheduler_size_);
    swapcontext(&self->context, &scheduler_context_);
    __sanitizer_finish_switch_fiber(self->sanitizer_stack, &scheduler_bottom_, &scheduler_size_);
#else
    if (_setjmp(fiber_->jump) == 0) {
      _longjmp(scheduler_jump_, 1);
    }
#endif
  }

  Index3 grid_;
  unsigned threads_;
  std::function<void()> kernel_;
  LaunchOptions options_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Fiber*> runnable_;
  std::vector<char*> stacks_, free_stacks_;
  Fiber* fiber_ = nullptr;
  ucontext_t scheduler_context_;
  jmp_buf scheduler_jump_;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
  std::string error_;
};

// Counts the __ldg loads from a range of addresses.
struct WatchedLoads {
  uintptr_t first = 0, last = 0;
  int64_t count = 0;

  void note(const void* address) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    count += at >= first && at < last ? 1 : 0;
  }
};

inline WatchedLoads& watched_loads() {
  static WatchedLoads loads;
  return loads;
}

// How often each MG_OPS_NOTE was passed.
inline std::map<std::string, int64_t>& notes() {
  static std::map<std::string, int64_t> counts;
  return counts;
}

inline Launch& launch() { return *Launch::current_launch(); }

// Stand-ins for threadIdx and the like, read at every use.
struct BuiltIn {
  struct Reader {
    unsigned (*read)();
    operator unsigned() const { return read(); }
  } x, y;
};

template <typename T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename Combine>
uint32_t reduce(uint32_t lanes, uint32_t value, Combine combine) {
  const uint64_t* values = launch().exchange(WarpOperation::kReduce, lanes, value);
  uint32_t result = 0;
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if ((lanes >> lane & 1) != 0) {
      const uint32_t there = static_cast<uint32_t>(values[lane]);
      result = first ? there : combine(result, there);
      first = false;
    }
  }
  return result;
}

}  // namespace cuda_on_cpu

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define MG_OPS_NOTE(what) ++cuda_on_cpu::notes()[what]
#define MG_OPS_SHARED(Type, name) \
  Type& name =                    \
      *static_cast<Type*>(cuda_on_cpu::launch().shared_memory(0, sizeof(Type), cuda_on_cpu::launch().fiber()->block))

static const cuda_on_cpu::BuiltIn threadIdx{
    {[] { return static_cast<unsigned>(cuda_on_cpu::launch().fiber()->thread); }}, {[] { return 0u; }}};
static const cuda_on_cpu::BuiltIn blockIdx{{[] { return cuda_on_cpu::launch().fiber()->block->index.x; }},
                                           {[] { return cuda_on_cpu::launch().fiber()->block->index.y; }}};
static const cuda_on_cpu::BuiltIn gridDim{{[] { return cuda_on_cpu::launch().grid().x; }},
                                          {[] { return cuda_on_cpu::launch().grid().y; }}};

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) double2 {
  double x, y;
};

static inline void __syncthreads() { cuda_on_cpu::launch().block_barrier(0, 0); }
static inline int __syncthreads_or(int value) { return cuda_on_cpu::launch().block_barrier(1, value); }
static inline void __syncwarp(uint32_t lanes = 0xffffffffu) {
  cuda_on_cpu::launch().exchange(cuda_on_cpu::WarpOperation::kSync, lanes, 0);
}
static inline void __threadfence() { cuda_on_cpu::launch().maybe_yield(); }

template <typename T>
T __shfl_sync(uint32_t lanes, T value, int source) {
  return cuda_on_cpu::from_bits<T>(cuda_on_cpu::launch().exchange(cuda_on_cpu::WarpOperation::kShuffle, lanes,
                                                                  cuda_on_cpu::to_bits(value))[source & 31]);
}
template <typename T>
T __shfl_up_sync(uint32_t lanes, T value, unsigned distance) {
  const uint64_t* values =
      cuda_on_cpu::launch().exchange(cuda_on_cpu::WarpOperation::kShuffle, lanes, cuda_on_cpu::to_bits(value));
  const int lane = cuda_on_cpu::launch().fiber()->thread % 32;
  const int source = lane - static_cast<int>(distance);
  return source >= 0 ? cuda_on_cpu::from_bits<T>(values[source]) : value;
}
static inline uint32_t __ballot_sync(uint32_t lanes, bool predicate) {
  const uint64_t* values =
      cuda_on_cpu::launch().exchange(cuda_on_cpu::WarpOperation::kBallot, lanes, predicate ? 1 : 0);
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    result |= (lanes >> lane & 1) != 0 && values[lane] != 0 ? 1u << lane : 0u;
  }
  return result;
}
static inline uint32_t __match_any_sync(uint32_t lanes, uint32_t value) {
  const uint64_t* values = cuda_on_cpu::launch().exchange(cuda_on_cpu::WarpOperation::kMatchAny, lanes, value);
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    result |= (lanes >> lane & 1) != 0 && values[lane] == value ? 1u << lane : 0u;
  }
  return result;
}
static inline uint32_t __reduce_max_sync(uint32_t lanes, uint32_t value) {
  return cuda_on_cpu::reduce(lanes, value, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
static inline uint32_t __reduce_min_sync(uint32_t lanes, uint32_t value) {
  return cuda_on_cpu::reduce(lanes, value, [](uint32_t a, uint32_t b) { return a < b ? a : b; });
}
static inline uint32_t __reduce_or_sync(uint32_t lanes, uint32_t value) {
  return cuda_on_cpu::reduce(lanes, value, [](uint32_t a, uint32_t b) { return a | b; });
}
static inline uint32_t __reduce_add_sync(uint32_t lanes, uint32_t value) {
  return cuda_on_cpu::reduce(lanes, value, [](uint32_t a, uint32_t b) { return a + b; });
}

template <typename T>
T atomicAdd(T* address, T value) {
  cuda_on_cpu::launch().maybe_yield();
  const T before = *address;
  *address = before + value;
  return before;
}
template <typename T>
T atomicMax(T* address, T value) {
  cuda_on_cpu::launch().maybe_yield();
  const T before = *address;
  *address = before > value ? before : value;
  return before;
}

template <typename T>
T atomicOr(T* address, T value) {
  cuda_on_cpu::launch().maybe_yield();
  const T before = *address;
  *address = before | value;
  return before;
}

template <typename T>
T __ldg(const T* address) {
  cuda_on_cpu::watched_loads().note(address);
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
