// Integers read where they lie; no torch here.
#pragma once

#include "../problem.h"

namespace mg_ops {

MG_OPS_INLINE int64_t load_integer(const IntegerInput& input, int64_t index) {
  return input.is_int64 ? static_cast<const int64_t*>(input.data)[index * input.stride]
                        : static_cast<const int32_t*>(input.data)[index * input.stride];
}

}  // namespace mg_ops
