// Who works on one problem: one thread (or one group of lanes) alone, or several CUDA threads.
//
// A team's members share their arrays and walk through the same code with the same scalars. A loop
// over FASTFI_EACH deals its iterations out, always in the same way, so that a member may go on
// with elements of its own; before it reads another member's, all of them sync(). What one of them
// is to write, leads() writes.
#pragma once

#include "scalar.h"

FASTFI_BEGIN

// base[at] of an array of N elements, or of any length where N is 0. On a CUDA thread an index that
// is not known at compile time would take the whole array out of the registers.
template <int N, class V, class I>
FASTFI_HD V pick(const V* base, I at) {
#ifdef FASTFI_DEVICE
  if constexpr (N > 0) {
    V found = base[0];
    FASTFI_UNROLL
    for (int i = 1; i < N; ++i) found = select(at == i, base[i], found);
    return found;
  }
#endif
  return gather(base, at);
}

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
