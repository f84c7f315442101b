// The offsets of the objects, which kernels ask for to be checked.
#pragma once

#include "../check.h"
#include "load_integer.h"

namespace mg_ops {

// Raises unless the offsets start at 0, never decrease and stay within the objects.
inline void check_offsets(const IntegerInput& gt_offsets, int64_t batch_size, int64_t num_gt) {
  int64_t previous = 0;
  for (int64_t i = 0; i <= batch_size; ++i) {
    const int64_t offset = load_integer(gt_offsets, i);
    if (i == 0 && offset != 0) {
      fail("gt_offsets: must start at 0, got ", offset);
    }
    if (offset < previous) {
      fail("gt_offsets: must not decrease, got ", previous, " then ", offset, " for image ", i - 1);
    }
    previous = offset;
  }
  if (previous > num_gt) {
    fail("gt_offsets: must not exceed the ", num_gt, " packed objects, got ", previous);
  }
}

}  // namespace mg_ops
