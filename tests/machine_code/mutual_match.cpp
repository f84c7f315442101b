// Mutual matching by the machine code of its kernels, as a plain C function. Python calls it through ctypes
// (tests/machine_code/__init__.py).
#include "../cuda_on_cpu/cuda_on_cpu.h"
// The built-ins come first.
#include "../cuda_on_cpu/mutual_match_call.h"
#include "machine.h"

#include <cstdio>

namespace {

using machine_code::Counts;
using machine_code::Kernel;
using machine_code::Machine;
using machine_code::Region;

constexpr const char* kNames[] = {"prepare_kernel", "object_kernel", "claim_kernel", "rank_kernel"};

Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

std::vector<Counts>& counts() {
  static std::vector<Counts> of_the_last_call;
  return of_the_last_call;
}

// How often each instruction of a kernel was issued by the last call.
std::map<std::string, std::vector<int64_t>>& issued() {
  static std::map<std::string, std::vector<int64_t>> by_kernel;
  return by_kernel;
}

// The kernels of a listing of `cuobjdump -sass`: two lines an instruction, each with half of its encoding.
void read_listing(const char* listing) {
  std::istringstream lines(listing);
  Kernel* kernel = nullptr;
  std::string text;
  uint64_t low = 0;
  for (std::string line; std::getline(lines, line);) {
    const size_t name = line.find("Function : ");
    if (name != std::string::npos) {
      const std::string function = line.substr(name);
      kernel = nullptr;
      for (const char* known : kNames) {
        if (function.find(known) != std::string::npos) {
          kernel = &machine().kernels[known];
          kernel->name = known;
          kernel->code.clear();
        }
      }
      continue;
    }
    const size_t encoding = line.rfind("/* 0x");
    if (kernel == nullptr || encoding == std::string::npos) {
      continue;
    }
    const uint64_t word = std::strtoull(line.c_str() + encoding + 3, nullptr, 16);
    const size_t begin = line.find("*/"), end = line.find(';');
    if (end != std::string::npos) {
      text = line.substr(line.find_first_not_of(" ", begin + 2), end - line.find_first_not_of(" ", begin + 2));
      low = word;
    } else {
      kernel->code.push_back(machine_code::read_instruction(text, low, word));
    }
  }
}

// What the kernels may read: up to the last element of a tensor.
void add_input(const StridedArray& array, std::initializer_list<int64_t> sizes, int64_t bytes, const char* name) {
  int64_t last = 0;
  size_t dimension = 0;
  for (const int64_t size : sizes) {
    if (size == 0) {
      return;
    }
    last += (size - 1) * array.strides[dimension++];
  }
  if (array.data != nullptr) {
    const uint64_t length = static_cast<uint64_t>((last + 1) * bytes);
    machine().regions.push_back({reinterpret_cast<uint64_t>(array.data), length, false, name, {}});
  }
}

void add_writable(const void* data, int64_t bytes, const char* name) {
  if (bytes > 0) {
    const std::vector<uint8_t> written(static_cast<size_t>(bytes + 3) / 4, 0);
    machine().regions.push_back({reinterpret_cast<uint64_t>(data), static_cast<uint64_t>(bytes), true, name, written});
  }
}

void match(EmulatedCall& call) {
  mg_ops::cuda::LaunchedProblem problem{};
  const Scratch scratch = make_problem(call, problem);
  machine().regions.clear();
  machine().l2.clear();
  machine().seed = call.seed;
  counts().clear();
  issued().clear();

  const int64_t images = call.batch_size, anchors = call.num_anchors, objects = call.num_gt;
  const int64_t number_bytes[] = {2, 2, 4, 8};
  const auto float_bytes = [&](const StridedArray& array) { return number_bytes[array.type]; };
  const auto integer_bytes = [](const StridedArray& array) { return array.type != 0 ? 8 : 4; };
  add_writable(scratch.get(), call.scratch_bytes, "scratch");
  add_input(call.anchors, {1, anchors, 4}, float_bytes(call.anchors), "anchors");
  add_input(call.pred_boxes, {images, anchors, 4}, float_bytes(call.pred_boxes), "pred_boxes");
  add_input(call.cls_scores, {images, anchors, call.num_classes}, float_bytes(call.cls_scores), "cls_scores");
  add_input(call.gt_boxes, {1, objects, 4}, float_bytes(call.gt_boxes), "gt_boxes");
  add_input(call.gt_labels, {objects}, integer_bytes(call.gt_labels), "gt_labels");
  add_input(call.gt_offsets, {images + 1}, integer_bytes(call.gt_offsets), "gt_offsets");
  add_input(call.gt_crowd, {objects}, 1, "gt_crowd");
  add_writable(call.cls_match, 8 * images * anchors, "cls_match");
  add_writable(call.loc_match, 8 * images * anchors, "loc_match");
  add_writable(call.num_pos, 4 * objects, "num_pos");
  add_writable(call.num_total, 4 * objects, "num_total");

  using mg_ops::cuda::LaunchedProblem;
  void (*const kernels[])(LaunchedProblem) = {mg_ops::cuda::prepare_kernel, mg_ops::cuda::object_kernel,
                                              mg_ops::cuda::claim_kernel, mg_ops::cuda::rank_kernel};
  mg_ops::cuda::launch_mutual_match(
      problem, [&](int64_t grid_x, int64_t grid_y, int threads, void (*kernel)(LaunchedProblem)) {
        const int64_t number = std::find(std::begin(kernels), std::end(kernels), kernel) - std::begin(kernels);
        const char* name = kNames[number];
        const Kernel& code = machine().kernels.at(name);
        if (code.parameter_bytes != sizeof problem) {
          machine_code::fail(std::string(name) + " was compiled for other parameters");
        }
        Counts of_launch = machine().launch(code, static_cast<uint32_t>(grid_x), static_cast<uint32_t>(grid_y),
                                            static_cast<uint32_t>(threads), &problem);
        of_launch.kernel = number;
        counts().push_back(of_launch);
        issued()[name] = machine().issued;
      });
}

template <typename Function>
int try_to(Function function, char* message, int message_bytes) {
  try {
    function();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, static_cast<size_t>(message_bytes), "%s", error.what());
    return 1;
  }
}

}  // namespace

// These return 0, or 1 with what went wrong in `message`.
extern "C" int load_listing(const char* listing, char* message, int message_bytes) {
  return try_to([&] { read_listing(listing); }, message, message_bytes);
}

extern "C" int mutual_match_on_cpu(EmulatedCall* call, char* message, int message_bytes) {
  return try_to([&] { match(*call); }, message, message_bytes);
}

// What a listing does not say of a kernel.
extern "C" void describe_kernel(const char* name, int registers, int64_t shared_bytes, int64_t parameter_bytes,
                                const uint8_t* constants, int64_t num_constants) {
  Kernel& kernel = machine().kernels[name];
  kernel.registers = registers;
  kernel.shared_bytes = static_cast<size_t>(shared_bytes);
  kernel.parameter_bytes = static_cast<size_t>(parameter_bytes);
  kernel.constants.assign(constants, constants + num_constants);
}

extern "C" int64_t counts_of_the_last_call(Counts* copied, int64_t room) {
  const size_t count = std::min(counts().size(), static_cast<size_t>(room));
  std::copy_n(counts().begin(), count, copied);
  return static_cast<int64_t>(count);
}

// The instructions of a kernel, each behind how often the last call issued it.
extern "C" const char* issued_by_the_last_call(const char* name) {
  static std::string text;
  text.clear();
  const std::vector<int64_t>& times = issued()[name];
  for (size_t i = 0; i < times.size(); ++i) {
    char place[40];
    std::snprintf(place, sizeof place, "%10lld  %05zx  ", static_cast<long long>(times[i]), 16 * i);
    text += place + machine().kernels.at(name).code[i].text + "\n";
  }
  return text.c_str();
}

extern "C" int threads_of_a_block() { return mg_ops::cuda::kThreads; }
extern "C" int list_room() { return static_cast<int>(mg_ops::cuda::kListRoom); }
