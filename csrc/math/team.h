// Who works on one problem: one thread (or one group of lanes) alone, or several CUDA threads.
//
// A team's members share their arrays and walk through the same code with the same scalars. A loop
// over FASTFI_EACH deals its iterations out, always in the same way, so that a member may go on
// with elements of its own; before it reads another member's, all of them sync(). What one of them
// is to write, leads() writes.
#pragma once

#include "scalar.h"

FASTFI_BEGIN

struct Alone {
  static constexpr int64_t kSize = 1;
  static FASTFI_HD int64_t rank() { return 0; }
  static FASTFI_HD bool leads() { return true; }
  static FASTFI_HD void sync() {}
  template <class V>
  static FASTFI_HD V sum(V x) {
    return x;
  }
  // The member with the largest value, among equal ones that with the least index.
  template <class V, class I>
  static FASTFI_HD void best(V*, I*) {}
};

#define FASTFI_EACH(Team, i, begin, end) \
  FASTFI_UNROLL                          \
  for (int64_t i = (begin) + Team::rank(); i < (end); i += Team::kSize)

FASTFI_END
