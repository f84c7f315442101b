// Executes machine code of sm_90: the warps of a launch on a model of an H100, and counts what they do.
//
// Lanes of a warp run together; they part at branches only, and meet again at BSYNC and WARPSYNC, as in hardware. The
// order of instructions comes from the model of time, which reads the stalls and counters in their encoding: four
// schedulers a multiprocessor, what pipes and caches take, latencies. The model is not calibrated: compare its times
// only with each other. A seed other than 0 delays warps at random, so that every order can come up, and varies what is
// not known of the hardware: the last bit of reciprocals, and which divisions go the slow way.
//
// Reported as errors: accesses out of bounds or misaligned, reads of what was never written, constant loads of what the
// launch writes, and barriers and operations of a warp that not all of its lanes reach.
#pragma once

#include <algorithm>
#include <array>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <queue>
#include <random>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "instruction.h"

namespace machine_code {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kMultiprocessors = 132, kSchedulers = 4, kCounters = 6;
constexpr size_t kParameters = 0x210;  // where they begin in constant bank 0
constexpr size_t kSharedBegin = 0x400;

using Words = std::array<uint32_t, 32>;
using LongWords = std::array<uint64_t, 32>;
using Floats = std::array<float, 32>;

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<uint8_t> constants;  // bank 2
  size_t parameter_bytes = 0, shared_bytes = 0;
  int registers = 0;
};

// A launch's counts. tests/machine_code/__init__.py mirrors it.
struct Counts {
  int64_t kernel, blocks, warps, instructions, longest_warp, cycles, longest_block, sectors_read, sectors_written,
      dram_sectors, global_atomics, worst_global_atomic, shared_atomics, worst_shared_atomic, barriers, slow_divisions,
      registers, resident_warps;
};

// Memory that a launch may use.
struct Region {
  uint64_t begin, bytes;
  bool writable;
  const char* name;
  std::vector<uint8_t> written;  // of writable ones, a flag for every four bytes
  bool loaded_as_constant = false, stored = false;
};

struct Random {
  uint64_t state;
  uint64_t next() {
    state += 0x9e3779b97f4a7c15ull;
    uint64_t z = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t limit) { return static_cast<uint32_t>((next() >> 32) * limit >> 32); }
};

enum class Wait : uint8_t { kNot, kLanes, kWarp, kBlock };

// Lanes that run together, and what they wait for.
struct Path {
  int at;
  uint32_t lanes;
  Wait wait = Wait::kNot;
  int barrier = 0;
};

struct Block;

struct Warp {
  Block* block = nullptr;
  uint32_t index = 0;
  uint32_t live = kAllLanes;
  std::vector<Words> registers;
  std::array<uint32_t, 8> predicates{}, uniform_predicates{};  // a bit a lane
  std::array<uint32_t, 64> uniforms{};
  std::array<Words, 16> barriers{};  // of each lane: which lanes meet there
  uint32_t barrier_result = 0;
  std::vector<Path> paths{{0, kAllLanes}};
  size_t current = 0;
  int64_t issued = 0;
  int scheduler = 0;
  int64_t clock = 0;
  std::array<int64_t, kCounters> counters{};  // when each is 0 again
  bool is_queued = false;
};

struct Block {
  uint32_t x = 0, y = 0, threads = 0;
  int multiprocessor = 0;
  int64_t started = 0;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<uint8_t> shared, written;
  uint32_t arrived = 0, exited = 0, any = 0;
  std::unordered_map<uint64_t, int64_t> atomics;
};

struct Multiprocessor {
  std::array<int64_t, kSchedulers> issue{}, integer{}, multiply{}, other_float{}, special{};
  int64_t memory = 0;
  int blocks = 0;
  std::unordered_set<uint64_t> l1;
};

template <typename Function>
void for_lanes(uint32_t lanes, Function function) {
  for (; lanes != 0; lanes &= lanes - 1) {
    function(__builtin_ctz(lanes));
  }
}

template <typename Result, typename Function, typename... Arrays>
std::array<Result, 32> map_lanes(Function function, const Arrays&... arrays) {
  std::array<Result, 32> result;
  for (size_t lane = 0; lane < 32; ++lane) {
    result[lane] = function(arrays[lane]...);
  }
  return result;
}

inline float to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value != value ? 0x7fffffffu : bits;  // a GPU knows one NaN
}
inline float flush(float value) { return std::fabs(value) < 1.17549435e-38f ? std::copysign(0.0f, value) : value; }

class RoundingMode {
 public:
  explicit RoundingMode(int mode) : before_(std::fegetround()) { std::fesetround(mode); }
  ~RoundingMode() { std::fesetround(before_); }

 private:
  int before_;
};

class Machine {
 public:
  std::map<std::string, Kernel> kernels;
  std::vector<Region> regions;
  uint64_t seed = 0;
  std::unordered_set<uint64_t> l2;  // sectors that some launch has touched
  std::vector<int64_t> issued;      // of each instruction, by the last launch

  Counts launch(const Kernel& kernel, uint32_t grid_x, uint32_t grid_y, uint32_t threads, const void* parameters) {
    kernel_ = &kernel;
    random_.state = seed * 7919 + 1;
    counts_ = {};
    issued.assign(kernel.code.size(), 0);
    atomics_.clear();
    multiprocessors_.assign(kMultiprocessors, {});
    dram_ = 0;
    number_ = 0;
    for (Region& region : regions) {
      region.loaded_as_constant = region.stored = false;
    }
    const uint32_t sizes[] = {threads, 1, 1, grid_x, grid_y, 1};
    constants_.assign(kParameters + kernel.parameter_bytes, 0xa5);
    std::memcpy(constants_.data(), sizes, sizeof sizes);
    std::memcpy(constants_.data() + kParameters, parameters, kernel.parameter_bytes);

    grid_x_ = grid_x;
    threads_ = threads;
    order_.resize(static_cast<size_t>(grid_x) * grid_y);
    for (size_t i = 0; i < order_.size(); ++i) {
      order_[i] = static_cast<uint32_t>(i);
    }
    if (seed != 0) {
      for (size_t i = order_.size(); i > 1; --i) {
        std::swap(order_[i - 1], order_[random_.below(static_cast<uint32_t>(i))]);
      }
    }
    next_block_ = 0;
    blocks_.clear();
    const uint32_t warps = threads / 32;
    const uint32_t by_registers = 65536u / 256u / (static_cast<uint32_t>(kernel.registers + 7) / 8) / warps;
    const uint32_t by_shared = static_cast<uint32_t>(233472 / (kernel.shared_bytes + 1024));
    resident_blocks_ = static_cast<int>(std::min({by_registers, by_shared, 64 / warps, 32u}));
    run();

    counts_.blocks = static_cast<int64_t>(order_.size());
    counts_.warps = counts_.blocks * warps;
    counts_.registers = kernel.registers;
    counts_.resident_warps = resident_blocks_ * static_cast<int>(warps);
    for (const auto& [address, count] : atomics_) {
      counts_.worst_global_atomic = std::max(counts_.worst_global_atomic, count);
    }
    return counts_;
  }

 private:
  struct Event {
    int64_t time;
    uint64_t number;
    Warp* warp;
    bool operator<(const Event& other) const {  // the first is the largest of a queue
      return time != other.time ? time > other.time : number > other.number;
    }
  };

  const Kernel* kernel_ = nullptr;
  Random random_{0};
  Counts counts_{};
  std::vector<uint8_t> constants_;
  std::vector<uint32_t> order_;
  size_t next_block_ = 0;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Multiprocessor> multiprocessors_;
  std::priority_queue<Event> events_;
  std::unordered_map<uint64_t, int64_t> atomics_;
  uint64_t number_ = 0;
  uint32_t grid_x_ = 0, threads_ = 0;
  int resident_blocks_ = 0;
  int64_t dram_ = 0, now_ = 0;
  int64_t latency_ = 0, occupied_ = 0;  // of the memory access just made

  // --- time
  // ------------------------------------------------------------------------------------------------------------

  void run() {
    events_ = {};
    start_blocks(0);
    while (!blocks_.empty()) {
      if (events_.empty()) {
        fail("deadlock: all that is left waits");
      }
      const Event event = events_.top();
      events_.pop();
      Warp& warp = *event.warp;
      const Instruction& instruction = kernel_->code[static_cast<size_t>(warp.paths[warp.current].at)];
      Multiprocessor& multiprocessor = multiprocessors_[static_cast<size_t>(warp.block->multiprocessor)];
      const size_t scheduler = static_cast<size_t>(warp.scheduler);
      int64_t& integer = multiprocessor.integer[scheduler];
      int64_t& special = multiprocessor.special[scheduler];
      int64_t& multiply = multiprocessor.multiply[scheduler];
      int64_t& other_float = multiprocessor.other_float[scheduler];
      int64_t& either_float = other_float <= multiply ? other_float : multiply;
      const Pipe pipe = instruction.pipe;
      const int64_t free = pipe == Pipe::kInteger    ? integer
                           : pipe == Pipe::kMultiply ? multiply
                           : pipe == Pipe::kFloat    ? either_float
                           : pipe == Pipe::kSpecial  ? special
                           : pipe == Pipe::kMemory   ? multiprocessor.memory - 16  // it has a queue
                                                     : 0;
      now_ = std::max({event.time, multiprocessor.issue[scheduler], free});
      if (now_ > event.time) {
        events_.push({now_, event.number, event.warp});
        continue;
      }
      warp.is_queued = false;
      multiprocessor.issue[scheduler] = now_ + 1;
      latency_ = pipe == Pipe::kSpecial ? 22 : 24;
      occupied_ = 1;
      switch (pipe) {
        case Pipe::kInteger: integer = now_ + 2; break;
        case Pipe::kMultiply: multiply = now_ + 2; break;
        case Pipe::kFloat: either_float = now_ + 2; break;
        case Pipe::kSpecial: special = now_ + 8; break;
        default: break;
      }
      try {
        step(warp, instruction);
      } catch (const std::runtime_error& error) {
        fail(std::string(error.what()) + ": " + kernel_->name + ": " + instruction.text + ", in block " +
             std::to_string(warp.block->x) + ", " + std::to_string(warp.block->y) + ", warp " +
             std::to_string(warp.index));
      }
      if (pipe == Pipe::kMemory) {
        multiprocessor.memory = std::max(multiprocessor.memory, now_) + occupied_;
        latency_ += multiprocessor.memory - now_ - occupied_;
      }
      warp.clock = now_ + std::max(1, instruction.stall);
      if (seed != 0 && random_.below(16) == 0) {
        warp.clock += random_.below(3000);
      }
      if (instruction.write_counter < kCounters) {
        int64_t& counter = warp.counters[static_cast<size_t>(instruction.write_counter)];
        counter = std::max(counter, now_ + latency_);
      }
      if (instruction.read_counter < kCounters) {
        int64_t& counter = warp.counters[static_cast<size_t>(instruction.read_counter)];
        counter = std::max(counter, now_ + 12);
      }
      counts_.cycles = std::max(counts_.cycles, warp.clock);
      Block& block = *warp.block;
      if (instruction.op == Op::kBlockBarrier && block.arrived == 0) {
        for (const auto& other : block.warps) {
          other->clock = std::max(other->clock, now_ + 22);
          queue(*other);
        }
      } else {
        queue(warp);
      }
      if (block.exited == threads_) {
        retire(block, warp.clock);
      }
    }
  }

  void queue(Warp& warp) {
    if (warp.live == 0 || warp.is_queued) {
      return;
    }
    if (warp.paths[warp.current].wait != Wait::kNot) {
      std::vector<size_t> ready;
      for (size_t i = 0; i < warp.paths.size(); ++i) {
        if (warp.paths[i].wait == Wait::kNot) {
          ready.push_back(i);
        }
      }
      if (ready.empty()) {
        return;
      }
      warp.current = ready[seed == 0 ? 0 : random_.below(static_cast<uint32_t>(ready.size()))];
    }
    const Instruction& instruction = kernel_->code[static_cast<size_t>(warp.paths[warp.current].at)];
    int64_t time = warp.clock;
    for (size_t counter = 0; counter < kCounters; ++counter) {
      if (instruction.awaited_counters >> counter & 1) {
        time = std::max(time, warp.counters[counter]);
      }
    }
    warp.is_queued = true;
    events_.push({time, number_++, &warp});
  }

  void start_blocks(int64_t time) {
    while (next_block_ < order_.size()) {
      size_t emptiest = 0;
      for (size_t i = 1; i < multiprocessors_.size(); ++i) {
        emptiest = multiprocessors_[i].blocks < multiprocessors_[emptiest].blocks ? i : emptiest;
      }
      if (multiprocessors_[emptiest].blocks >= resident_blocks_) {
        return;
      }
      ++multiprocessors_[emptiest].blocks;
      auto block = std::make_unique<Block>();
      const uint32_t number = order_[next_block_++];
      block->x = number % grid_x_;
      block->y = number / grid_x_;
      block->multiprocessor = static_cast<int>(emptiest);
      block->started = time;
      block->shared.assign(kernel_->shared_bytes, static_cast<uint8_t>(random_.next()));
      block->written.assign((kernel_->shared_bytes + 3) / 4, 0);
      for (uint32_t i = 0; i < threads_ / 32; ++i) {
        auto warp = std::make_unique<Warp>();
        warp->block = block.get();
        warp->index = i;
        warp->scheduler = static_cast<int>((i + number) % kSchedulers);
        warp->clock = time;
        Words garbage;
        garbage.fill(static_cast<uint32_t>(random_.next()));
        warp->registers.assign(static_cast<size_t>(kernel_->registers) + 1, garbage);
        warp->registers.back().fill(0);
        warp->predicates.fill(garbage[0]);
        warp->predicates[kTrue] = warp->uniform_predicates[kTrue] = kAllLanes;
        warp->uniforms.fill(garbage[0]);
        warp->uniforms[kZeroUniform] = 0;
        queue(*warp);
        block->warps.push_back(std::move(warp));
      }
      blocks_.push_back(std::move(block));
    }
  }

  void retire(Block& block, int64_t time) {
    for (const auto& warp : block.warps) {
      counts_.longest_warp = std::max(counts_.longest_warp, warp->issued);
    }
    for (const auto& [address, count] : block.atomics) {
      counts_.worst_shared_atomic = std::max(counts_.worst_shared_atomic, count);
    }
    counts_.longest_block = std::max(counts_.longest_block, time - block.started);
    --multiprocessors_[static_cast<size_t>(block.multiprocessor)].blocks;
    const auto is_it = [&](const auto& other) { return other.get() == &block; };
    std::swap(*std::find_if(blocks_.begin(), blocks_.end(), is_it), blocks_.back());
    blocks_.pop_back();
    start_blocks(time + 150);
  }

  // --- operands
  // --------------------------------------------------------------------------------------------------------

  Words& register_of(Warp& warp, int index) const {
    if (index == kZeroRegister) {
      return warp.registers.back();
    }
    if (index >= kernel_->registers) {
      fail("R" + std::to_string(index) + " of a kernel of fewer registers");
    }
    return warp.registers[static_cast<size_t>(index)];
  }

  // Word number `word` of an operand, as it stands in registers or memory.
  Words raw(Warp& warp, const Operand& operand, int word = 0, size_t bytes = 4) const {
    Words values;
    switch (operand.kind) {
      case Operand::kNumber: values.fill(word == 0 ? operand.number : 0); return values;
      case Operand::kRegister:
        return register_of(warp, operand.index == kZeroRegister ? operand.index : operand.index + word);
      case Operand::kUniform:
        values.fill(
            warp.uniforms[static_cast<size_t>(operand.index == kZeroUniform ? operand.index : operand.index + word)]);
        return values;
      case Operand::kConstant: {
        const std::vector<uint8_t>& bank = operand.index == 0 ? constants_ : kernel_->constants;
        const Words& base = register_of(warp, operand.base);
        const uint32_t uniform = warp.uniforms[static_cast<size_t>(operand.uniform_base)];
        values.fill(0);
        for (size_t lane = 0; lane < 32; ++lane) {
          const size_t place = static_cast<uint32_t>(base[lane] + uniform + operand.offset + 4 * word);
          if (place + bytes <= bank.size()) {  // lanes that are not active may have any address
            std::memcpy(&values[lane], bank.data() + place, bytes);
          }
        }
        return values;
      }
      default: fail("an operand that has no value");
    }
  }
  Words integers(Warp& warp, const Operand& operand) const {
    Words values = raw(warp, operand);
    for (uint32_t& value : values) {
      value = operand.inverted ? ~value : value;
      value = operand.negative ? 0u - value : value;
    }
    return values;
  }
  LongWords long_integers(Warp& warp, const Operand& operand) const {
    return map_lanes<uint64_t>(
        [&](uint32_t low, uint32_t high) {
          uint64_t value = low | static_cast<uint64_t>(high) << 32;
          value = operand.inverted ? ~value : value;
          return operand.negative ? 0ull - value : value;
        },
        raw(warp, operand), raw(warp, operand, 1));
  }
  Words float_bits(Warp& warp, const Operand& operand) const {
    Words values = raw(warp, operand);
    for (uint32_t& value : values) {
      value = (operand.absolute ? value & 0x7fffffffu : value) ^ (operand.negative ? 0x80000000u : 0u);
    }
    return values;
  }
  Floats floats(Warp& warp, const Operand& operand) const {
    return map_lanes<float>(to_float, float_bits(warp, operand));
  }
  uint32_t predicate(const Warp& warp, const Operand& operand) const {
    if (!operand.is_predicate()) {
      fail("an operand that is no predicate");
    }
    const auto& file = operand.kind == Operand::kPredicate ? warp.predicates : warp.uniform_predicates;
    return file[static_cast<size_t>(operand.index)] ^ (operand.inverted ? kAllLanes : 0u);
  }

  void set(Warp& warp, const Operand& operand, uint32_t lanes, const Words& values, int word = 0) const {
    if (operand.kind == Operand::kUniform) {
      if (operand.index != kZeroUniform && lanes != 0) {
        warp.uniforms[static_cast<size_t>(operand.index + word)] = values[static_cast<size_t>(__builtin_ctz(lanes))];
      }
    } else if (operand.kind == Operand::kRegister && operand.index != kZeroRegister) {
      Words& target = register_of(warp, operand.index + word);
      for (uint32_t lane = 0; lane < 32; ++lane) {
        target[lane] = lanes >> lane & 1 ? values[lane] : target[lane];
      }
    }
  }
  void set(Warp& warp, const Operand& operand, uint32_t lanes, const LongWords& values) const {
    set(warp, operand, lanes, map_lanes<uint32_t>([](uint64_t value) { return static_cast<uint32_t>(value); }, values));
    set(warp, operand, lanes,
        map_lanes<uint32_t>([](uint64_t value) { return static_cast<uint32_t>(value >> 32); }, values), 1);
  }
  void set_predicate(Warp& warp, const Operand& operand, uint32_t lanes, uint32_t values) const {
    if (operand.index == kTrue) {
      return;
    }
    if (operand.kind == Operand::kUniformPredicate) {
      const bool value = lanes != 0 && (values >> __builtin_ctz(lanes) & 1) != 0;
      warp.uniform_predicates[static_cast<size_t>(operand.index)] = value ? kAllLanes : 0;
    } else {
      uint32_t& target = warp.predicates[static_cast<size_t>(operand.index)];
      target = (target & ~lanes) | (values & lanes);
    }
  }

  // --- arithmetic
  // ------------------------------------------------------------------------------------------------------

  template <typename Number>
  static uint32_t compare(const Instruction& in, const std::array<Number, 32>& a, const std::array<Number, 32>& b) {
    const auto has = [&](auto... modifiers) { return (in.has(modifiers) || ...); };
    const bool less = has(MODIFIER("LT"), MODIFIER("LE"), MODIFIER("NE"), MODIFIER("LTU"), MODIFIER("LEU"),
                          MODIFIER("NEU"), MODIFIER("NUM"));
    const bool greater = has(MODIFIER("GT"), MODIFIER("GE"), MODIFIER("NE"), MODIFIER("GTU"), MODIFIER("GEU"),
                             MODIFIER("NEU"), MODIFIER("NUM"));
    const bool equal = has(MODIFIER("EQ"), MODIFIER("LE"), MODIFIER("GE"), MODIFIER("EQU"), MODIFIER("LEU"),
                           MODIFIER("GEU"), MODIFIER("NUM"));
    const bool unordered = has(MODIFIER("EQU"), MODIFIER("NEU"), MODIFIER("LTU"), MODIFIER("LEU"), MODIFIER("GTU"),
                               MODIFIER("GEU"), MODIFIER("NAN"));
    uint32_t result = 0;
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const bool holds = a[lane] < b[lane]    ? less
                         : a[lane] > b[lane]  ? greater
                         : a[lane] == b[lane] ? equal
                                              : unordered;
      result |= static_cast<uint32_t>(holds) << lane;
    }
    return result;
  }

  // Combines a comparison with the predicate operand, and writes both results.
  void set_compared(Warp& warp, const Instruction& in, uint32_t lanes, uint32_t result) const {
    const uint32_t with = predicate(warp, in.operands[4]);
    const bool either = in.has(MODIFIER("OR"));
    set_predicate(warp, in.operands[0], lanes, either ? result | with : result & with);
    set_predicate(warp, in.operands[1], lanes, either ? ~result | with : ~result & with);
  }

  // The inputs of an addition, after its outputs: registers first, then carries.
  void add(Warp& warp, const Instruction& in, uint32_t lanes) const {
    size_t i = 1;
    while (in.operands[i].is_predicate()) {
      ++i;
    }
    const size_t outputs = i;
    LongWords sum{};
    for (; i < in.operands.size(); ++i) {
      const Operand& operand = in.operands[i];
      if (operand.is_predicate()) {
        const uint32_t carry = predicate(warp, operand);
        for (size_t lane = 0; lane < 32; ++lane) {
          sum[lane] += carry >> lane & 1;
        }
        continue;
      }
      const Words values = raw(warp, operand);
      const bool is_zero = operand.kind == Operand::kRegister && operand.index == kZeroRegister;
      for (size_t lane = 0; lane < 32; ++lane) {
        sum[lane] += operand.inverted               ? static_cast<uint32_t>(~values[lane])
                     : operand.negative && !is_zero ? 0x100000000ull - values[lane]
                                                    : values[lane];
      }
    }
    Words low;
    uint32_t carries[2] = {0, 0};
    for (uint32_t lane = 0; lane < 32; ++lane) {
      low[lane] = static_cast<uint32_t>(sum[lane]);
      carries[0] |= static_cast<uint32_t>(sum[lane] >> 32 >= 1) << lane;
      carries[1] |= static_cast<uint32_t>(sum[lane] >> 32 >= 2) << lane;
    }
    set(warp, in.operands[0], lanes, low);
    for (size_t output = 1; output < outputs; ++output) {
      set_predicate(warp, in.operands[output], lanes, carries[output - 1]);
    }
  }

  void multiply_add(Warp& warp, const Instruction& in, uint32_t lanes) const {
    const auto& operands = in.operands;
    if (!in.has(MODIFIER("WIDE")) && !in.has(MODIFIER("HI"))) {
      const uint32_t carry = in.has(MODIFIER("X")) ? predicate(warp, operands[4]) : 0;
      Words result =
          map_lanes<uint32_t>([](uint32_t a, uint32_t b, uint32_t c) { return a * b + c; }, integers(warp, operands[1]),
                              integers(warp, operands[2]), integers(warp, operands[3]));
      for (size_t lane = 0; lane < 32; ++lane) {
        result[lane] += carry >> lane & 1;
      }
      set(warp, operands[0], lanes, result);
      return;
    }
    const size_t first = operands[1].is_predicate() ? 2 : 1;
    const bool is_unsigned = in.has(MODIFIER("U32"));
    const auto widened = [&](uint32_t value) {
      return is_unsigned ? value : static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(value)));
    };
    const LongWords products =
        map_lanes<uint64_t>([&](uint32_t a, uint32_t b) { return widened(a) * widened(b); },
                            integers(warp, operands[first]), integers(warp, operands[first + 1]));
    const LongWords sums = map_lanes<uint64_t>([](uint64_t a, uint64_t b) { return a + b; }, products,
                                               long_integers(warp, operands[first + 2]));
    if (in.has(MODIFIER("WIDE"))) {
      set(warp, operands[0], lanes, sums);
    } else {
      set(warp, operands[0], lanes, map_lanes<uint32_t>([](uint64_t sum) { return uint32_t(sum >> 32); }, sums));
    }
    if (first == 2) {
      uint32_t carry = 0;
      for (uint32_t lane = 0; lane < 32; ++lane) {
        carry |= static_cast<uint32_t>(sums[lane] < products[lane]) << lane;
      }
      set_predicate(warp, operands[1], lanes, carry);
    }
  }

  // Adds a number shifted left, or the high word of a pair shifted left.
  void shift_add(Warp& warp, const Instruction& in, uint32_t lanes) const {
    const auto& operands = in.operands;
    const size_t first = operands[1].is_predicate() ? 2 : 1;
    const bool high = in.has(MODIFIER("HI")), extends = in.has(MODIFIER("SX32"));
    const Words a = integers(warp, operands[first]), b = integers(warp, operands[first + 1]);
    const size_t next = high && !extends ? first + 3 : first + 2;
    const Words c = high && !extends ? integers(warp, operands[first + 2])
                    : extends        ? map_lanes<uint32_t>([](uint32_t x) { return x >> 31 != 0 ? ~0u : 0u; }, a)
                                     : Words{};
    const uint32_t shift = operands[next].number;
    const uint32_t carry_in = in.has(MODIFIER("X")) ? predicate(warp, operands[next + 1]) : 0;
    Words result;
    uint32_t carry = 0;
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const uint64_t shifted = (a[lane] | static_cast<uint64_t>(c[lane]) << 32) << shift;
      const uint64_t sum = static_cast<uint64_t>(static_cast<uint32_t>(high ? shifted >> 32 : shifted)) + b[lane] +
                           (carry_in >> lane & 1);
      result[lane] = static_cast<uint32_t>(sum);
      carry |= static_cast<uint32_t>(sum >> 32) << lane;
    }
    set(warp, operands[0], lanes, result);
    if (first == 2) {
      set_predicate(warp, operands[1], lanes, carry);
    }
  }

  void shift(Warp& warp, const Instruction& in, uint32_t lanes) const {
    const bool is_left = in.has(MODIFIER("L")), high = in.has(MODIFIER("HI")), wraps = in.has(MODIFIER("W"));
    const bool is_long = in.has(MODIFIER("U64")) || in.has(MODIFIER("S64"));
    const bool is_signed = in.has(MODIFIER("S32")) || in.has(MODIFIER("S64"));
    const auto shifted = [&](uint32_t low, uint32_t distance, uint32_t top) -> uint32_t {
      distance = wraps ? distance & (is_long ? 63 : 31) : std::min(distance, is_long ? 64u : 32u);
      if (!is_left && high && !is_long) {  // the high word by itself
        const int32_t signed_top = static_cast<int32_t>(top);
        return is_signed       ? static_cast<uint32_t>(signed_top >> std::min(distance, 31u))
               : distance > 31 ? 0
                               : top >> distance;
      }
      const uint64_t pair = low | static_cast<uint64_t>(top) << 32;
      const int64_t signed_pair = static_cast<int64_t>(pair);
      const uint64_t result = is_left     ? (distance > 63 ? 0 : pair << distance)
                              : is_signed ? static_cast<uint64_t>(signed_pair >> std::min(distance, 63u))
                                          : (distance > 63 ? 0 : pair >> distance);
      return static_cast<uint32_t>(high ? result >> 32 : result);
    };
    set(warp, in.operands[0], lanes,
        map_lanes<uint32_t>(shifted, integers(warp, in.operands[1]), integers(warp, in.operands[2]),
                            integers(warp, in.operands[3])));
  }

  // All 32 lanes' results of an operation that a table of eight bits describes.
  static uint32_t look_up(uint32_t table, uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    for (uint32_t i = 0; i < 8; ++i) {
      result |= (table >> i & 1 ? ~0u : 0u) & (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    }
    return result;
  }

  void logic(Warp& warp, const Instruction& in, uint32_t lanes) const {
    const size_t first = in.operands[0].is_predicate() ? 1 : 0;
    const uint32_t table = in.operands[first + 4].number;
    const Words result =
        map_lanes<uint32_t>([&](uint32_t a, uint32_t b, uint32_t c) { return look_up(table, a, b, c); },
                            integers(warp, in.operands[first + 1]), integers(warp, in.operands[first + 2]),
                            integers(warp, in.operands[first + 3]));
    if (first == 1) {
      uint32_t any = predicate(warp, in.operands[first + 5]);
      for (uint32_t lane = 0; lane < 32; ++lane) {
        any |= static_cast<uint32_t>(result[lane] != 0) << lane;
      }
      set_predicate(warp, in.operands[0], lanes, any);
    }
    set(warp, in.operands[first], lanes, result);
  }

  static uint32_t permute(uint32_t a, uint32_t selector, uint32_t b) {
    const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
    uint32_t result = 0;
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t select = selector >> (4 * i) & 15;
      uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (select & 7)) & 255);
      byte = (select & 8) == 0 ? byte : byte >> 7 != 0 ? 255 : 0;
      result |= byte << (8 * i);
    }
    return result;
  }

  uint32_t reciprocal(float x) const {
    uint32_t bits = to_bits(static_cast<float>(1.0 / static_cast<double>(x)));
    const bool is_normal = (bits & 0x7f800000u) != 0x7f800000u && (bits & 0x7fffffffu) > 0x00800001u;
    return seed == 0 || !is_normal ? bits
                                   : bits + Random{seed ^ to_bits(x)}.below(3) - 1;  // equal operands, equal error
  }

  bool divides_slowly(uint32_t a, uint32_t b) const {
    const int exponent = static_cast<int>(a >> 23 & 255), divisor = static_cast<int>(b >> 23 & 255);
    return exponent < 30 || exponent > 250 || divisor < 3 || divisor > 250 || std::abs(exponent - divisor) > 120 ||
           (seed != 0 && Random{seed ^ (static_cast<uint64_t>(a) << 32 | b)}.below(5) == 0);
  }

  void arithmetic(Warp& warp, const Instruction& in, uint32_t lanes) {
    const auto& operands = in.operands;
    const auto a = [&] { return integers(warp, operands[1]); };
    const auto write = [&](const Words& values) { set(warp, operands[0], lanes, values); };
    const auto write_floats = [&](const Floats& values) { write(map_lanes<uint32_t>(to_bits, values)); };
    switch (in.op) {
      case Op::kMove: write(a()); break;
      case Op::kHalves: write(a()); break;
      case Op::kMultiplyAdd: multiply_add(warp, in, lanes); break;
      case Op::kAdd: add(warp, in, lanes); break;
      case Op::kShiftAdd: shift_add(warp, in, lanes); break;
      case Op::kShift: shift(warp, in, lanes); break;
      case Op::kLogic: logic(warp, in, lanes); break;
      case Op::kPredicateLogic: {
        const uint32_t p = predicate(warp, operands[2]), q = predicate(warp, operands[3]);
        const uint32_t r = predicate(warp, operands[4]);
        set_predicate(warp, operands[0], lanes, look_up(operands[5].number, p, q, r));
        set_predicate(warp, operands[1], lanes, look_up(operands[6].number, p, q, r));
        break;
      }
      case Op::kCompare: {
        const Words x = integers(warp, operands[2]), y = integers(warp, operands[3]);
        const auto as_signed = [](uint32_t value) { return static_cast<int32_t>(value); };
        uint32_t result = in.has(MODIFIER("U32"))
                              ? compare(in, x, y)
                              : compare(in, map_lanes<int32_t>(as_signed, x), map_lanes<int32_t>(as_signed, y));
        if (in.has(MODIFIER("EX"))) {  // the high words: where they are equal, the low ones decide
          uint32_t equal = 0;
          for (uint32_t lane = 0; lane < 32; ++lane) {
            equal |= static_cast<uint32_t>(x[lane] == y[lane]) << lane;
          }
          result = (result & ~equal) | (predicate(warp, operands[5]) & equal);
        }
        set_compared(warp, in, lanes, result);
        break;
      }
      case Op::kCompareFloat: {
        Floats x = floats(warp, operands[2]), y = floats(warp, operands[3]);
        if (in.has(MODIFIER("FTZ"))) {
          x = map_lanes<float>(flush, x);
          y = map_lanes<float>(flush, y);
        }
        set_compared(warp, in, lanes, compare(in, x, y));
        break;
      }
      case Op::kSelect: {
        const uint32_t first = predicate(warp, operands[3]);
        const bool is_float = in.family == "FSEL";
        Words result = is_float ? float_bits(warp, operands[2]) : integers(warp, operands[2]);
        const Words other = is_float ? float_bits(warp, operands[1]) : integers(warp, operands[1]);
        for (uint32_t lane = 0; lane < 32; ++lane) {
          result[lane] = first >> lane & 1 ? other[lane] : result[lane];
        }
        write(result);
        break;
      }
      case Op::kFromPredicates: {
        const uint32_t mask = operands[3].number;
        Words result = integers(warp, operands[2]);
        for (uint32_t lane = 0; lane < 32; ++lane) {
          result[lane] &= ~mask;
          for (uint32_t i = 0; i < kTrue; ++i) {
            result[lane] |= (warp.predicates[i] >> lane & 1) << i & mask;
          }
        }
        write(result);
        break;
      }
      case Op::kToPredicates: {
        const Words values = a();
        for (uint32_t i = 0; i < kTrue; ++i) {
          uint32_t bits = 0;
          for (uint32_t lane = 0; lane < 32; ++lane) {
            bits |= (values[lane] >> i & 1) << lane;
          }
          const uint32_t set_lanes = operands[2].number >> i & 1 ? lanes : 0;
          warp.predicates[i] = (warp.predicates[i] & ~set_lanes) | (bits & set_lanes);
        }
        break;
      }
      case Op::kFloatAdd: {
        const bool flushes = in.has(MODIFIER("FTZ"));
        write_floats(map_lanes<float>([&](float x, float y) { return flushes ? flush(flush(x) + flush(y)) : x + y; },
                                      floats(warp, operands[1]), floats(warp, operands[2])));
        break;
      }
      case Op::kFloatMultiply:
        write_floats(map_lanes<float>([](float x, float y) { return x * y; }, floats(warp, operands[1]),
                                      floats(warp, operands[2])));
        break;
      case Op::kFloatMultiplyAdd: {
        const RoundingMode mode(in.has(MODIFIER("RZ"))   ? FE_TOWARDZERO
                                : in.has(MODIFIER("RP")) ? FE_UPWARD
                                : in.has(MODIFIER("RM")) ? FE_DOWNWARD
                                                         : FE_TONEAREST);
        write_floats(map_lanes<float>([](float x, float y, float z) { return std::fma(x, y, z); },
                                      floats(warp, operands[1]), floats(warp, operands[2]), floats(warp, operands[3])));
        break;
      }
      case Op::kFloatExtreme: {  // with NAN a NaN stays one; without, the number stays
        const bool is_minimum = predicate(warp, operands[3]) != 0, keeps = in.has(MODIFIER("NAN"));
        write_floats(map_lanes<float>(
            [&](float x, float y) {
              return x != x || y != y ? (keeps || (x != x && y != y) ? NAN
                                         : x != x                    ? y
                                                                     : x)
                     : x == y         ? (std::signbit(x) == is_minimum ? x : y)
                                      : ((x < y) == is_minimum ? x : y);
            },
            floats(warp, operands[1]), floats(warp, operands[2])));
        break;
      }
      case Op::kExtreme:
      case Op::kAddExtreme: {
        if (!in.has(MODIFIER("U32"))) {
          fail("unknown form");
        }
        Words x = a();
        size_t next = 2;
        if (in.op == Op::kAddExtreme) {
          x = map_lanes<uint32_t>([](uint32_t p, uint32_t q) { return p + q; }, x, integers(warp, operands[next++]));
        }
        const bool is_minimum = predicate(warp, operands[next + 1]) != 0;
        write(map_lanes<uint32_t>([&](uint32_t p, uint32_t q) { return is_minimum ? std::min(p, q) : std::max(p, q); },
                                  x, integers(warp, operands[next])));
        break;
      }
      case Op::kLeadingBit: {
        const bool as_shift = in.has(MODIFIER("SH"));
        write(map_lanes<uint32_t>(
            [&](uint32_t x) {
              const uint32_t zeros = x == 0 ? 0 : static_cast<uint32_t>(__builtin_clz(x));
              return x == 0 ? kAllLanes : as_shift ? zeros : 31 - zeros;
            },
            a()));
        break;
      }
      case Op::kReverse:
        write(map_lanes<uint32_t>(
            [](uint32_t x) {
              uint32_t reversed = 0;
              for (uint32_t i = 0; i < 32; ++i) {
                reversed |= (x >> i & 1) << (31 - i);
              }
              return reversed;
            },
            a()));
        break;
      case Op::kPopulation:
        write(map_lanes<uint32_t>([](uint32_t x) { return static_cast<uint32_t>(__builtin_popcount(x)); }, a()));
        break;
      case Op::kPermute:
        write(map_lanes<uint32_t>(permute, a(), integers(warp, operands[2]), integers(warp, operands[3])));
        break;
      case Op::kToFloat: {
        const RoundingMode mode(in.has(MODIFIER("RP")) ? FE_UPWARD : FE_TONEAREST);
        if (in.has(MODIFIER("U64"))) {
          write_floats(
              map_lanes<float>([](uint64_t x) { return static_cast<float>(x); }, long_integers(warp, operands[1])));
        } else if (in.has(MODIFIER("U32"))) {
          write_floats(map_lanes<float>([](uint32_t x) { return static_cast<float>(x); }, a()));
        } else {
          write_floats(map_lanes<float>([](uint32_t x) { return static_cast<float>(static_cast<int32_t>(x)); }, a()));
        }
        break;
      }
      case Op::kToInteger: {
        const bool is_long = in.has(MODIFIER("U64"));
        const double limit = is_long ? 0x1p64 : 0x1p32;
        const LongWords result = map_lanes<uint64_t>(
            [&](float x) -> uint64_t {
              return !(x > 0) ? 0 : x >= limit ? (is_long ? ~0ull : 0xffffffffull) : static_cast<uint64_t>(x);
            },
            floats(warp, operands[1]));
        if (is_long) {
          set(warp, operands[0], lanes, result);
        } else {
          write(map_lanes<uint32_t>([](uint64_t x) { return static_cast<uint32_t>(x); }, result));
        }
        break;
      }
      case Op::kFloatToFloat:  // from float64
        write_floats(map_lanes<float>(
            [](uint64_t bits) {
              double value;
              std::memcpy(&value, &bits, sizeof value);
              return static_cast<float>(value);
            },
            long_integers(warp, operands[1])));
        break;
      case Op::kFunction:
        if (in.has(MODIFIER("RSQ"))) {
          write_floats(map_lanes<float>([](float x) { return 1.0f / std::sqrt(x); }, floats(warp, operands[1])));
        } else {
          write(map_lanes<uint32_t>([&](float x) { return reciprocal(x); }, floats(warp, operands[1])));
        }
        break;
      case Op::kDivisionCheck: {
        const Words x = raw(warp, operands[1]), y = raw(warp, operands[2]);
        uint32_t slow = 0;
        for_lanes(lanes, [&](int lane) {
          slow |= static_cast<uint32_t>(divides_slowly(x[static_cast<size_t>(lane)], y[static_cast<size_t>(lane)]))
                  << lane;
        });
        counts_.slow_divisions += __builtin_popcount(slow);
        set_predicate(warp, operands[0], lanes, slow);
        break;
      }
      case Op::kSpecialRegister: {
        const std::string& name = operands[1].name;
        Words values;
        for (uint32_t lane = 0; lane < 32; ++lane) {
          values[lane] = name == "SR_TID.X"      ? warp.index * 32 + lane
                         : name == "SR_CTAID.X"  ? warp.block->x
                         : name == "SR_CTAID.Y"  ? warp.block->y
                         : name == "SR_LANEID"   ? lane
                         : name == "SR_LTMASK"   ? (1u << lane) - 1
                         : name == "SR_CgaCtaId" ? 0
                                                 : (fail("unknown register"), 0);
        }
        write(values);
        break;
      }
      case Op::kZero:
        write(Words{});
        if (!in.has(MODIFIER("32"))) {
          set(warp, operands[0], lanes, Words{}, 1);
        }
        break;
      case Op::kConstant: {
        const Words low = raw(warp, operands[1], 0, std::min<size_t>(4, static_cast<size_t>(in.bytes)));
        const Words high = raw(warp, operands[1], 1);  // before the address may be written over
        write(low);
        if (in.bytes == 8) {
          set(warp, operands[0], lanes, high, 1);
        }
        break;
      }
      case Op::kBarrierResult: set_predicate(warp, operands.back(), lanes, warp.barrier_result); break;
      default: fail("cannot execute");
    }
  }

  // What the lanes of a warp do together.
  void together(Warp& warp, const Instruction& in, uint32_t lanes) const {
    const auto& operands = in.operands;
    if (in.op == Op::kVote) {
      const uint32_t voters = predicate(warp, operands.back()) & lanes;
      Words all;
      all.fill(voters);
      const bool holds = in.has(MODIFIER("ALL")) ? voters == lanes : voters != 0;
      for (size_t i = 0; i + 1 < operands.size(); ++i) {
        if (operands[i].is_predicate()) {
          set_predicate(warp, operands[i], lanes, holds ? kAllLanes : 0);
        } else {
          set(warp, operands[i], lanes, all);
        }
      }
      return;
    }
    const Words values = integers(warp, operands[in.op == Op::kShuffle ? 2 : 1]);
    Words result{};
    if (in.op == Op::kReduce) {
      uint32_t reduced = in.has(MODIFIER("MIN")) ? kAllLanes : 0;
      for_lanes(lanes, [&](int lane) {
        const uint32_t value = values[static_cast<size_t>(lane)];
        reduced = in.has(MODIFIER("MAX"))   ? std::max(reduced, value)
                  : in.has(MODIFIER("MIN")) ? std::min(reduced, value)
                  : in.has(MODIFIER("OR"))  ? reduced | value
                                            : reduced + value;
      });
      result.fill(reduced);
      set(warp, operands[0], lanes, result);
    } else if (in.op == Op::kMatch) {
      for (uint32_t lane = 0; lane < 32; ++lane) {
        for_lanes(lanes, [&](int other) {
          result[lane] |= static_cast<uint32_t>(values[static_cast<size_t>(other)] == values[lane]) << other;
        });
      }
      set(warp, operands[0], lanes, result);
    } else {
      const Words distances = integers(warp, operands[3]), limits = integers(warp, operands[4]);
      uint32_t within = 0;
      for_lanes(lanes, [&](int lane) {
        const size_t place = static_cast<size_t>(lane);
        const int segment = static_cast<int>(limits[place] >> 8 & 31), clamp = static_cast<int>(limits[place] & 31);
        const int last = (lane & segment) | (clamp & ~segment), distance = static_cast<int>(distances[place] & 31);
        const bool is_up = in.has(MODIFIER("UP"));
        const int source = is_up ? lane - distance : (lane & segment) | (distance & ~segment);
        const bool is_within = is_up ? source >= last : source <= last;
        within |= static_cast<uint32_t>(is_within) << lane;
        if (is_within && (lanes >> source & 1) == 0) {
          fail("a shuffle from a lane that is not there");
        }
        result[place] = values[static_cast<size_t>(is_within ? source : lane)];
      });
      set_predicate(warp, operands[0], lanes, within);
      set(warp, operands[1], lanes, result);
    }
  }

  // --- memory
  // ----------------------------------------------------------------------------------------------------------

  Region& region_of(uint64_t address, uint64_t bytes) {
    for (Region& region : regions) {
      if (address >= region.begin && address + bytes <= region.begin + region.bytes) {
        return region;
      }
    }
    fail("out of bounds");
  }

  void memory(Warp& warp, const Instruction& in, uint32_t lanes) {
    const bool is_shared = in.family.back() == 'S';  // LDS, STS, ATOMS
    const bool is_load = in.op == Op::kLoad, is_atomic = in.op == Op::kAtomic;
    const uint64_t bytes = static_cast<uint64_t>(in.bytes);
    size_t place = 0;  // of the address among the operands
    while (in.operands[place].kind != Operand::kAddress) {
      ++place;
    }
    const Operand& operand = in.operands[place];
    const Words base = register_of(warp, operand.base);
    const Words high = operand.wide_base ? register_of(warp, operand.base + 1) : Words{};
    const size_t uniform = static_cast<size_t>(operand.uniform_base);
    const uint64_t from =
        warp.uniforms[uniform] | (operand.wide_uniform ? static_cast<uint64_t>(warp.uniforms[uniform + 1]) << 32 : 0);
    const Operand* const source = is_load                          ? nullptr
                                  : place + 1 < in.operands.size() ? &in.operands[place + 1]
                                                                   : nullptr;
    const Operand* const target = is_load                  ? &in.operands[0]
                                  : is_atomic && place > 0 ? &in.operands[place - 1]
                                                           : nullptr;
    std::array<Words, 4> moved{};
    for (int word = 0; source != nullptr && word < std::max(1, in.bytes / 4); ++word) {
      moved[static_cast<size_t>(word)] = raw(warp, *source, word);
    }

    std::vector<uint64_t> addresses;
    std::vector<size_t> order;
    for_lanes(lanes, [&](int lane) { order.push_back(static_cast<size_t>(lane)); });
    if (seed != 0 && !is_load) {
      std::shuffle(order.begin(), order.end(), std::minstd_rand(static_cast<uint32_t>(random_.next())));
    }
    for (const size_t lane : order) {
      uint64_t address = (base[lane] | static_cast<uint64_t>(high[lane]) << 32) * static_cast<uint64_t>(operand.scale) +
                         from + static_cast<uint64_t>(operand.offset);
      address = is_shared ? address & 0xffffffffu : address;
      addresses.push_back(address);
      if (address % bytes != 0) {
        fail("misaligned");
      }
      uint8_t* data;
      bool was_written = true;
      const auto note_written = [&](std::vector<uint8_t>& written, size_t offset) {
        for (size_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
          was_written = was_written && written[word] != 0;
          written[word] |= is_load ? 0 : 1;
        }
      };
      Block& block = *warp.block;
      if (is_shared) {
        if (address < kSharedBegin || address + bytes > kSharedBegin + block.shared.size()) {
          fail("out of bounds");
        }
        const size_t offset = address - kSharedBegin;
        data = block.shared.data() + offset;
        note_written(block.written, offset);
      } else {
        Region& region = region_of(address, bytes);
        data = reinterpret_cast<uint8_t*>(address);
        if (!is_load && !region.writable) {
          fail(std::string("writes to ") + region.name);
        }
        region.stored |= !is_load;
        region.loaded_as_constant |= in.has(MODIFIER("CONSTANT"));
        if (region.stored && region.loaded_as_constant) {
          fail(std::string("a constant load of ") + region.name + ", which the launch writes");
        }
        if (region.writable) {
          note_written(region.written, address - region.begin);
        }
      }
      // A wide load of shared memory may bring words that nobody uses.
      if (!was_written && in.op != Op::kStore && !(is_shared && is_load)) {
        fail("a read of what was never written");
      }
      if (is_load) {
        for (uint64_t word = 0; word < std::max<uint64_t>(1, bytes / 4); ++word) {
          uint32_t value = 0;
          std::memcpy(&value, data + 4 * word, std::min<uint64_t>(4, bytes));
          moved[word][lane] = value;
        }
      } else if (is_atomic) {
        uint64_t before = 0;
        std::memcpy(&before, data, bytes);
        const uint64_t value = moved[0][lane] | (bytes == 8 ? static_cast<uint64_t>(moved[1][lane]) << 32 : 0);
        const uint64_t after = in.has(MODIFIER("INC"))   ? before + 1
                               : in.has(MODIFIER("ADD")) ? before + value
                               : in.has(MODIFIER("OR"))  ? before | value
                                                         : std::max(before, value);
        std::memcpy(data, &after, bytes);
        moved[0][lane] = static_cast<uint32_t>(before);
        moved[1][lane] = static_cast<uint32_t>(before >> 32);
        ++(is_shared ? counts_.shared_atomics : counts_.global_atomics);
        ++(is_shared ? block.atomics : atomics_)[address];
      } else {
        for (uint64_t word = 0; word < bytes / 4; ++word) {
          std::memcpy(data + 4 * word, &moved[word][lane], 4);
        }
      }
    }
    for (int word = 0; target != nullptr && word < std::max(1, in.bytes / 4); ++word) {
      set(warp, *target, lanes, moved[static_cast<size_t>(word)], word);
    }
    if (!addresses.empty()) {
      is_shared ? time_shared(in, addresses) : time_global(warp, in, addresses);
    }
  }

  // As many passes as words of the most wanted of 32 banks.
  void time_shared(const Instruction& in, const std::vector<uint64_t>& addresses) {
    std::vector<uint64_t> words;
    for (const uint64_t address : addresses) {
      for (uint64_t word = address / 4; word <= (address + static_cast<uint64_t>(in.bytes) - 1) / 4; ++word) {
        words.push_back(word);
      }
    }
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    std::array<int64_t, 32> banks{};
    for (const uint64_t word : words) {
      ++banks[word % 32];
    }
    const int64_t passes = *std::max_element(banks.begin(), banks.end());
    latency_ = 29 + passes;
    occupied_ = passes;
    if (in.op == Op::kAtomic) {
      const int64_t lanes = static_cast<int64_t>(addresses.size());
      latency_ += in.has(MODIFIER("INC")) ? 10 : 2 * lanes;
      occupied_ = in.has(MODIFIER("INC")) ? 2 * passes : lanes;
    }
  }

  void time_global(const Warp& warp, const Instruction& in, const std::vector<uint64_t>& addresses) {
    std::vector<uint64_t> sectors;
    for (const uint64_t address : addresses) {
      sectors.push_back(address / 32);
    }
    std::sort(sectors.begin(), sectors.end());
    sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
    const bool is_load = in.op == Op::kLoad;
    (is_load ? counts_.sectors_read : counts_.sectors_written) += static_cast<int64_t>(sectors.size());
    const bool is_cached = is_load && !in.has(MODIFIER("STRONG"));
    auto& l1 = multiprocessors_[static_cast<size_t>(warp.block->multiprocessor)].l1;
    int64_t worst = 38, from_l2 = 0, from_dram = 0;
    for (const uint64_t sector : sectors) {
      if (is_cached && !l1.insert(sector).second) {
        continue;
      }
      ++from_l2;
      if (!l2.insert(sector).second) {
        worst = std::max<int64_t>(worst, 275);
      } else if (is_load) {
        ++from_dram;
        worst = 620;
      }
    }
    worst = in.family == "ATOMG" ? 350 : worst;
    if (from_dram != 0) {
      counts_.dram_sectors += from_dram;
      dram_ = std::max(dram_, now_ * 60) + from_dram;
      worst += dram_ / 60 - now_;
    }
    latency_ = worst;
    occupied_ = std::max<int64_t>({1, static_cast<int64_t>(sectors.size()) / 4, from_l2 / 2});
  }

  // --- control
  // ---------------------------------------------------------------------------------------------------------

  // Lets lanes go on that wait for each other, where all of them have come.
  void meet(Warp& warp) const {
    for (size_t i = 0; i < warp.paths.size(); ++i) {
      const Path first = warp.paths[i];
      if (first.wait != Wait::kLanes && first.wait != Wait::kWarp) {
        continue;
      }
      const size_t lane = static_cast<size_t>(__builtin_ctz(first.lanes));
      const uint32_t awaited =
          warp.live & (first.wait == Wait::kWarp ? kAllLanes : warp.barriers[static_cast<size_t>(first.barrier)][lane]);
      uint32_t here = 0;
      const auto is_with_it = [&](const Path& path) {
        return path.wait == first.wait && path.at == first.at && path.barrier == first.barrier &&
               (path.lanes & awaited) != 0;
      };
      for (const Path& path : warp.paths) {
        here |= is_with_it(path) ? path.lanes : 0;
      }
      if ((awaited & ~here) == 0) {
        warp.paths.erase(std::remove_if(warp.paths.begin(), warp.paths.end(), is_with_it), warp.paths.end());
        warp.paths.push_back({first.at + 1, here});
        warp.current = warp.paths.size() - 1;
        i = static_cast<size_t>(-1);  // from the start again
      }
    }
  }

  void step(Warp& warp, const Instruction& in) {
    Path& path = warp.paths[warp.current];
    ++warp.issued;
    ++counts_.instructions;
    ++issued[static_cast<size_t>(path.at)];
    const uint32_t lanes = path.lanes & predicate(warp, in.guard);
    const auto target = [&](uint64_t address) {
      if (address % 16 != 0 || address / 16 >= kernel_->code.size()) {
        fail("a jump to " + std::to_string(address));
      }
      return static_cast<int>(address / 16);
    };
    const auto jump = [&](uint32_t taken, int there) {
      if (taken == path.lanes) {
        path.at = there;
        return;
      }
      ++path.at;
      path.lanes &= ~taken;
      if (taken != 0) {
        warp.paths.push_back({there, taken});
        if (seed != 0 && random_.below(2) == 0) {
          warp.current = warp.paths.size() - 1;
        }
      }
    };
    const auto need_all = [&](uint32_t having) {
      if (having != warp.live) {
        fail("a divided warp");
      }
    };
    switch (in.op) {
      case Op::kNothing: ++path.at; break;
      case Op::kBranch: {
        const bool has_condition = in.operands.size() > 1;
        const uint32_t taken = has_condition ? lanes & predicate(warp, in.operands[0]) : lanes;
        // U: all lanes or none
        jump(in.has(MODIFIER("U")) && taken != path.lanes ? 0 : taken, target(in.operands.back().number));
        break;
      }
      case Op::kBranchIfDivided:
      case Op::kCollective:
        need_all(in.op == Op::kCollective ? 0 : path.lanes);
        ++path.at;
        break;
      case Op::kBranchIndexed:
      case Op::kReturn: {
        const Words from = integers(warp, in.operands[0]);
        const bool is_relative = in.op == Op::kBranchIndexed;
        const uint32_t offset = in.operands[1].number + (is_relative ? static_cast<uint32_t>(path.at) * 16 + 16 : 0);
        uint32_t left = lanes;
        while (left != 0) {
          const uint32_t value = from[static_cast<size_t>(__builtin_ctz(left))];
          uint32_t same = 0;
          for_lanes(left,
                    [&](int lane) { same |= static_cast<uint32_t>(from[static_cast<size_t>(lane)] == value) << lane; });
          left &= ~same;
          const int there = target(value + offset);
          if (left == 0 && same == warp.paths[warp.current].lanes) {
            warp.paths[warp.current].at = there;
          } else {
            warp.paths[warp.current].lanes &= ~same;
            warp.paths.push_back({there, same});
          }
        }
        break;
      }
      case Op::kCall: jump(lanes, target(in.operands[0].number)); break;
      case Op::kExit:
        if (lanes != 0 && warp.block->arrived != 0) {
          fail("others wait at a barrier");
        }
        warp.live &= ~lanes;
        warp.block->exited += static_cast<uint32_t>(__builtin_popcount(lanes));
        path.lanes &= ~lanes;
        ++path.at;
        if (path.lanes == 0) {
          warp.paths.erase(warp.paths.begin() + static_cast<std::ptrdiff_t>(warp.current));
          warp.current = 0;
        }
        meet(warp);
        break;
      case Op::kSetBarrier:
        for_lanes(lanes, [&](int lane) {
          warp.barriers[static_cast<size_t>(in.operands[0].index)][static_cast<size_t>(lane)] = path.lanes;
        });
        ++path.at;
        break;
      case Op::kLeaveBarrier: {
        Words& barrier = warp.barriers[static_cast<size_t>(in.operands[0].index)];
        uint32_t members = 0;
        for_lanes(lanes, [&](int lane) { members |= barrier[static_cast<size_t>(lane)]; });
        for_lanes(members, [&](int lane) { barrier[static_cast<size_t>(lane)] &= ~lanes; });
        ++path.at;
        meet(warp);
        break;
      }
      case Op::kSyncBarrier:
        path.wait = Wait::kLanes;
        path.barrier = in.operands[0].index;
        meet(warp);
        break;
      case Op::kSyncWarp:
        path.wait = Wait::kWarp;
        meet(warp);
        break;
      case Op::kBlockBarrier: {
        need_all(lanes);
        Block& block = *warp.block;
        if (block.exited != 0) {
          fail("a barrier after threads have left");
        }
        block.any |= in.has(MODIFIER("RED")) ? predicate(warp, in.operands[1]) & lanes : 0;
        path.wait = Wait::kBlock;
        block.arrived += 32;
        if (block.arrived == threads_) {
          ++counts_.barriers;
          for (const auto& other : block.warps) {
            Path& waiting = other->paths[0];
            if (other->paths.size() != 1 || waiting.at != path.at) {
              fail("different barriers");
            }
            waiting.wait = Wait::kNot;
            other->barrier_result = block.any != 0 ? kAllLanes : 0;
          }
          const int next = path.at + 1;
          for (const auto& other : block.warps) {
            other->paths[0].at = next;
          }
          block.arrived = block.any = 0;
        }
        break;
      }
      case Op::kVote:
      case Op::kMatch:
      case Op::kShuffle:
      case Op::kReduce:
        // VOTEU asks who is here, and shuffles look after each lane.
        if (in.family != "VOTEU" && in.op != Op::kShuffle) {
          need_all(lanes);
        }
        together(warp, in, lanes);
        ++path.at;
        break;
      case Op::kLoad:
      case Op::kStore:
      case Op::kAtomic:
        memory(warp, in, lanes);
        ++path.at;
        break;
      default:
        arithmetic(warp, in, lanes);
        ++path.at;
        break;
    }
  }
};

}  // namespace machine_code
