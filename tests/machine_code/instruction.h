// An instruction of SASS, the machine code of NVIDIA's GPUs, read from its line in cuobjdump's listing. Whatever is not
// known here, an instruction, a modifier or an operand, is an error.
#pragma once

#include <algorithm>
#include <bitset>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace machine_code {

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

constexpr int kZeroRegister = 255, kZeroUniform = 63;  // RZ and URZ: always 0
constexpr int kTrue = 7;                               // PT and UPT

// What follows an instruction's name, one name a bit.
constexpr std::string_view kModifiers[] = {
    "32",    "64",         "128", "ADD", "ALL",   "AND",    "ANY",  "CONSTANT", "DEFER_BLOCKING",
    "DIV",   "E",          "EF",  "EQ",  "EQU",   "EX",     "F32",  "F64",      "FTZ",
    "GE",    "GEU",        "GPU", "GT",  "GTU",   "HI",     "IADD", "IDX",      "INC",
    "L",     "LE",         "LEU", "LT",  "LTU",   "LUT",    "MAX",  "MIN",      "MMA",
    "MOV",   "NAN",        "NE",  "NEU", "NODEC", "NOINC",  "NTZ",  "NUM",      "OR",
    "POPC",  "R",          "RCP", "RED", "REL",   "RESULT", "RM",   "RP",       "RSQ",
    "RZ",    "S32",        "S64", "SH",  "SHL",   "SUM",    "SX32", "STRONG",   "SYNC",
    "TRUNC", "COLLECTIVE", "U",   "U16", "U32",   "U64",    "U8",   "UP",       "W",
    "WIDE",  "X"};

struct Modifier {
  size_t bit;
  constexpr explicit Modifier(std::string_view name) : bit(0) {
    while (bit < std::size(kModifiers) && kModifiers[bit] != name) {
      ++bit;
    }
  }
  constexpr bool is_known() const { return bit < std::size(kModifiers); }
};

enum class Op : uint8_t {
  kBranch,
  kBranchIfDivided,
  kBranchIndexed,
  kCall,
  kReturn,
  kExit,
  kSetBarrier,
  kLeaveBarrier,
  kSyncBarrier,
  kSyncWarp,
  kCollective,
  kBlockBarrier,
  kBarrierResult,
  kNothing,
  kMove,
  kHalves,
  kMultiplyAdd,
  kAdd,
  kShiftAdd,
  kShift,
  kLogic,
  kPredicateLogic,
  kCompare,
  kCompareFloat,
  kSelect,
  kFromPredicates,
  kToPredicates,
  kFloatAdd,
  kFloatMultiply,
  kFloatMultiplyAdd,
  kFloatExtreme,
  kExtreme,
  kAddExtreme,
  kLeadingBit,
  kReverse,
  kPopulation,
  kPermute,
  kToFloat,
  kToInteger,
  kFloatToFloat,
  kFunction,
  kDivisionCheck,
  kSpecialRegister,
  kZero,
  kConstant,
  kVote,
  kMatch,
  kShuffle,
  kReduce,
  kLoad,
  kStore,
  kAtomic
};

// What executes it, for the model of time.
enum class Pipe : uint8_t { kNone, kInteger, kMultiply, kFloat, kSpecial, kMemory };

struct Family {
  const char* name;
  Op op;
  Pipe pipe;
  const char* modifiers;  // those that are known
  bool is_float = false;  // its immediate operands are
};

constexpr Family kFamilies[] = {
    {"BRA", Op::kBranch, Pipe::kNone, "DIV U"},
    {"BRX", Op::kBranchIndexed, Pipe::kNone, ""},
    {"CALL", Op::kCall, Pipe::kNone, "REL NOINC"},
    {"RET", Op::kReturn, Pipe::kNone, "REL NODEC"},
    {"EXIT", Op::kExit, Pipe::kNone, ""},
    {"BSSY", Op::kSetBarrier, Pipe::kNone, ""},
    {"BREAK", Op::kLeaveBarrier, Pipe::kNone, ""},
    {"BSYNC", Op::kSyncBarrier, Pipe::kNone, ""},
    {"WARPSYNC", Op::kSyncWarp, Pipe::kNone, "ALL COLLECTIVE"},
    {"ENDCOLLECTIVE", Op::kCollective, Pipe::kNone, ""},
    {"BAR", Op::kBlockBarrier, Pipe::kNone, "SYNC RED OR DEFER_BLOCKING"},
    {"B2R", Op::kBarrierResult, Pipe::kNone, "RESULT"},
    {"NOP", Op::kNothing, Pipe::kNone, ""},
    {"YIELD", Op::kNothing, Pipe::kNone, ""},
    {"MOV", Op::kMove, Pipe::kInteger, ""},
    {"R2UR", Op::kMove, Pipe::kInteger, ""},
    {"HFMA2", Op::kHalves, Pipe::kMultiply, "MMA"},
    {"IMAD", Op::kMultiplyAdd, Pipe::kMultiply, "MOV U32 IADD SHL WIDE HI X"},
    {"IADD3", Op::kAdd, Pipe::kInteger, "X"},
    {"VIADD", Op::kAdd, Pipe::kInteger, ""},
    {"LEA", Op::kShiftAdd, Pipe::kInteger, "HI X SX32"},
    {"SHF", Op::kShift, Pipe::kInteger, "L R U32 S32 U64 S64 HI W"},
    {"LOP3", Op::kLogic, Pipe::kInteger, "LUT"},
    {"PLOP3", Op::kPredicateLogic, Pipe::kInteger, "LUT"},
    {"ISETP", Op::kCompare, Pipe::kInteger, "EQ NE LT LE GT GE U32 AND OR EX"},
    {"FSETP", Op::kCompareFloat, Pipe::kInteger, "EQ NE LT LE GT GE EQU NEU LTU LEU GTU GEU NAN NUM AND OR FTZ", true},
    {"SEL", Op::kSelect, Pipe::kInteger, ""},
    {"FSEL", Op::kSelect, Pipe::kInteger, "", true},
    {"P2R", Op::kFromPredicates, Pipe::kInteger, ""},
    {"R2P", Op::kToPredicates, Pipe::kInteger, ""},
    {"FADD", Op::kFloatAdd, Pipe::kFloat, "FTZ", true},
    {"FMUL", Op::kFloatMultiply, Pipe::kFloat, "", true},
    {"FFMA", Op::kFloatMultiplyAdd, Pipe::kFloat, "RZ RP RM", true},
    {"FMNMX", Op::kFloatExtreme, Pipe::kInteger, "NAN", true},
    {"VIMNMX", Op::kExtreme, Pipe::kInteger, "U32"},
    {"VIADDMNMX", Op::kAddExtreme, Pipe::kInteger, "U32"},
    {"FLO", Op::kLeadingBit, Pipe::kSpecial, "U32 SH"},
    {"BREV", Op::kReverse, Pipe::kSpecial, ""},
    {"POPC", Op::kPopulation, Pipe::kSpecial, ""},
    {"PRMT", Op::kPermute, Pipe::kInteger, ""},
    {"I2FP", Op::kToFloat, Pipe::kInteger, "F32 S32 U32"},
    {"I2F", Op::kToFloat, Pipe::kSpecial, "S32 U32 U64 RP"},
    {"F2I", Op::kToInteger, Pipe::kSpecial, "FTZ U32 U64 TRUNC NTZ"},
    {"F2F", Op::kFloatToFloat, Pipe::kSpecial, "F32 F64"},
    {"MUFU", Op::kFunction, Pipe::kSpecial, "RCP RSQ", true},
    {"FCHK", Op::kDivisionCheck, Pipe::kSpecial, "", true},
    {"S2R", Op::kSpecialRegister, Pipe::kNone, ""},
    {"S2UR", Op::kSpecialRegister, Pipe::kNone, ""},
    {"CS2R", Op::kZero, Pipe::kNone, "32"},
    {"LDC", Op::kConstant, Pipe::kMemory, "64 U8"},
    {"VOTEU", Op::kVote, Pipe::kNone, "ANY ALL"},
    {"VOTE", Op::kVote, Pipe::kInteger, "ANY ALL"},
    {"MATCH", Op::kMatch, Pipe::kInteger, "ANY"},
    {"SHFL", Op::kShuffle, Pipe::kMemory, "UP IDX"},
    {"REDUX", Op::kReduce, Pipe::kInteger, "MAX MIN OR SUM"},
    {"LDG", Op::kLoad, Pipe::kMemory, "E U8 U16 64 128 CONSTANT STRONG GPU"},
    {"LDS", Op::kLoad, Pipe::kMemory, "U8 U16 64 128"},
    {"STG", Op::kStore, Pipe::kMemory, "E 64 128 EF STRONG GPU"},
    {"STS", Op::kStore, Pipe::kMemory, "64 128"},
    {"REDG", Op::kAtomic, Pipe::kMemory, "E ADD MAX 64 STRONG GPU"},
    {"ATOMG", Op::kAtomic, Pipe::kMemory, "E ADD MAX 64 STRONG GPU"},
    {"ATOMS", Op::kAtomic, Pipe::kMemory, "POPC INC 32 ADD OR MAX"},
};

struct Operand {
  enum Kind : uint8_t {
    kNumber,
    kRegister,
    kUniform,
    kPredicate,
    kUniformPredicate,
    kBarrier,
    kConstant,
    kAddress,
    kSpecial
  };
  Kind kind = kNumber;
  bool negative = false, absolute = false, inverted = false;
  int index = 0;                                                     // of a register, predicate, barrier, constant bank
  int base = kZeroRegister, scale = 1, uniform_base = kZeroUniform;  // an address is base * scale + uniform + offset
  bool wide_base = false, wide_uniform = false;                      // of 64 bits
  int64_t offset = 0;
  uint32_t number = 0;
  std::string name;  // of a special register

  bool is_predicate() const { return kind == kPredicate || kind == kUniformPredicate; }
};

struct Instruction {
  std::string text, family;
  Op op = Op::kNothing;
  Pipe pipe = Pipe::kNone;
  std::bitset<128> modifiers;
  std::vector<Operand> operands;
  Operand guard;
  // What the hardware waits for: cycles to the next instruction; which of six counters writes and reads of this one
  // are counted by (7: none), and which must be 0 before it is issued.
  int stall = 1, write_counter = 7, read_counter = 7, awaited_counters = 0;
  int bytes = 4;  // a lane moves

  bool has(Modifier modifier) const { return modifiers[modifier.bit]; }
};

#define MODIFIER(modifier_name)                                     \
  ([] {                                                             \
    constexpr ::machine_code::Modifier known(modifier_name);        \
    static_assert(known.is_known(), "no modifier: " modifier_name); \
    return known;                                                   \
  }())

inline int64_t read_integer(const std::string& text) {
  char* end = nullptr;
  const bool minus = text[0] == '-';
  const uint64_t value = std::strtoull(text.c_str() + (minus ? 1 : 0), &end, 0);
  if (text.size() <= (minus ? 1 : 0) || *end != 0) {
    fail("unknown operand " + text);
  }
  return minus ? -static_cast<int64_t>(value) : static_cast<int64_t>(value);
}

inline bool starts_with(const std::string& text, std::string_view start) {
  return text.compare(0, start.size(), start) == 0;
}

inline bool take_suffix(std::string& text, std::string_view suffix) {
  const bool has =
      text.size() >= suffix.size() && text.compare(text.size() - suffix.size(), suffix.size(), suffix) == 0;
  text.resize(has ? text.size() - suffix.size() : text.size());
  return has;
}

// Sets an operand to what "R7", "UPT" and the like name. Returns whether it is such a name.
inline bool read_register(const std::string& text, Operand& operand) {
  struct Name {
    const char* prefix;
    Operand::Kind kind;
    int last;  // that of "Z" or "T"
  };
  constexpr Name kNames[] = {{"UR", Operand::kUniform, kZeroUniform},
                             {"UP", Operand::kUniformPredicate, kTrue},
                             {"R", Operand::kRegister, kZeroRegister},
                             {"P", Operand::kPredicate, kTrue},
                             {"B", Operand::kBarrier, -1}};
  for (const Name& name : kNames) {
    if (starts_with(text, name.prefix)) {
      const std::string number = text.substr(std::string(name.prefix).size());
      const bool is_last = name.last >= 0 && (number == "Z" || number == "T");
      if (is_last || (!number.empty() && number.find_first_not_of("0123456789") == std::string::npos)) {
        operand.kind = name.kind;
        operand.index = is_last ? name.last : std::atoi(number.c_str());
        return true;
      }
    }
  }
  return false;
}

// The sum within the brackets of an address: "R2.64+UR4+0x10".
inline void read_sum(const std::string& sum, Operand& operand) {
  std::istringstream parts(sum);
  for (std::string part; std::getline(parts, part, '+');) {
    Operand named;
    const size_t scaled = part.find(".X");
    const int scale = scaled == std::string::npos ? 1 : std::atoi(part.c_str() + scaled + 2);
    part.resize(std::min(part.size(), scaled));
    const bool wide = take_suffix(part, ".64");
    take_suffix(part, ".U32");
    if (!read_register(part, named)) {
      operand.offset += read_integer(part);
    } else if (named.kind == Operand::kRegister) {
      operand.base = named.index;
      operand.scale = scale;
      operand.wide_base = wide;
    } else {
      operand.uniform_base = named.index;
      operand.wide_uniform = wide;
    }
  }
}

inline Operand read_operand(std::string text, bool is_float) {
  Operand operand;
  for (size_t found; (found = text.find(".reuse")) != std::string::npos;) {
    text.erase(found, 6);
  }
  if (text[0] == '!' || text[0] == '~') {
    operand.inverted = true;
    text.erase(0, 1);
  }
  if (text[0] == '-' && text.find_first_of("Rc|") == 1 + static_cast<size_t>(text[1] == 'U')) {
    operand.negative = true;
    text.erase(0, 1);
  }
  if (text[0] == '|') {
    operand.absolute = true;
    text = text.substr(1, text.size() - 2);
  }
  if (read_register(text, operand)) {
    return operand;
  }
  if (starts_with(text, "SR") || text == "PR") {
    operand.kind = Operand::kSpecial;
    operand.name = text;
  } else if (starts_with(text, "desc[") || text[0] == '[') {
    operand.kind = Operand::kAddress;
    const size_t begin = text.rfind('[') + 1;
    read_sum(text.substr(begin, text.rfind(']') - begin), operand);
  } else if (starts_with(text, "c[")) {
    operand.kind = Operand::kConstant;
    operand.index = static_cast<int>(std::strtol(text.c_str() + 2, nullptr, 0));
    const size_t begin = text.rfind('[') + 1;
    read_sum(text.substr(begin, text.rfind(']') - begin), operand);
  } else if (is_float && !starts_with(text, "0x")) {
    char* end = nullptr;
    const float value = std::strtof(take_suffix(text, "QNAN") ? "nan" : text.c_str(), &end);
    if (*end != 0) {
      fail("unknown operand " + text);
    }
    std::memcpy(&operand.number, &value, sizeof value);
  } else {
    operand.number = static_cast<uint32_t>(read_integer(text));
  }
  return operand;
}

// `text` is what stands before the semicolon; `low` and `high` are the instruction's 128 bits.
inline Instruction read_instruction(const std::string& text, uint64_t low, uint64_t high) {
  Instruction instruction;
  instruction.text = text;
  instruction.stall = static_cast<int>(high >> 41 & 15);
  instruction.write_counter = static_cast<int>(high >> 46 & 7);
  instruction.read_counter = static_cast<int>(high >> 49 & 7);
  instruction.awaited_counters = static_cast<int>(high >> 52 & 63);

  std::istringstream words(text);
  std::string word;
  words >> word;
  instruction.guard = read_operand(word[0] == '@' ? word.substr(1) : "PT", false);
  if (word[0] == '@') {
    words >> word;
  }
  std::istringstream names(word);
  std::string family;
  std::getline(names, family, '.');
  const Family* known = nullptr;
  bool is_uniform = false;  // U before the name: once for the warp, on uniform registers
  for (const Family& candidate : kFamilies) {
    is_uniform = is_uniform || family == std::string("U") + candidate.name;
    if (family == candidate.name || family == std::string("U") + candidate.name) {
      known = &candidate;
    }
  }
  if (known == nullptr) {
    fail("unknown instruction " + text);
  }
  instruction.family = known->name;
  instruction.op = known->op;
  instruction.pipe = is_uniform ? Pipe::kNone : known->pipe;
  for (std::string name; std::getline(names, name, '.');) {
    const Modifier modifier(name);
    if (!modifier.is_known() ||
        (" " + std::string(known->modifiers) + " ").find(" " + name + " ") == std::string::npos) {
      fail("unknown modifier " + name + " of " + text);
    }
    instruction.modifiers.set(modifier.bit);
  }
  const auto has = [&](Modifier modifier) { return instruction.has(modifier); };
  instruction.bytes = has(MODIFIER("U8"))    ? 1
                      : has(MODIFIER("U16")) ? 2
                      : has(MODIFIER("64"))  ? 8
                      : has(MODIFIER("128")) ? 16
                                             : 4;
  instruction.op = has(MODIFIER("DIV"))          ? Op::kBranchIfDivided
                   : has(MODIFIER("COLLECTIVE")) ? Op::kCollective
                                                 : instruction.op;
  if (instruction.op == Op::kHalves) {  // a constant: -RZ * RZ plus two halves
    if (text.find(", -RZ, RZ, ") == std::string::npos) {
      fail("unknown form of " + text);
    }
    words >> word;
    Operand constant;
    constant.number = static_cast<uint32_t>(low >> 32);
    instruction.operands = {read_operand(word.substr(0, word.size() - 1), false), constant};
    return instruction;
  }
  while (words >> word) {
    take_suffix(word, ",");
    if (!word.empty()) {  // "+INF ," is one operand
      instruction.operands.push_back(read_operand(word, known->is_float));
    }
  }
  return instruction;
}

}  // namespace machine_code
