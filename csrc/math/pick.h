// An entry whose place is known only at run time.
#pragma once

#include "scalar.h"

FASTFI_BEGIN

// base[at] of an array of N elements, or of any length where N is 0. On a CUDA thread such an index
// would take the whole array out of the registers.
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

FASTFI_END
