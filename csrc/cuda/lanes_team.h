// A team of L neighbouring lanes of a warp: see csrc/math/team.h.
#pragma once

#include "../math/team.h"
#include "runtime.h"

FASTFI_BEGIN

template <int L>
struct Lanes {
  static constexpr int64_t kSize = L;

#ifdef FASTFI_DEVICE
  static FASTFI_HD int64_t rank() { return threadIdx.x % L; }
  // Neighbouring teams of a warp take turns of their own.
  static FASTFI_HD unsigned mask() {
    const unsigned first = threadIdx.x % 32 / L * L;
    return L == 32 ? 0xffffffffu : ((1u << (L % 32)) - 1u) << first;
  }
  static FASTFI_HD void sync() { __syncwarp(mask()); }
  // Pairs, then pairs of pairs: every member adds the same numbers, so that all get the same sum.
  static FASTFI_HD double sum(double x) {
    for (int w = L / 2; w > 0; w /= 2) x += __shfl_xor_sync(mask(), x, w);
    return x;
  }
  static FASTFI_HD void best(double* value, int64_t* index) {
    for (int w = L / 2; w > 0; w /= 2) {
      const double v = __shfl_xor_sync(mask(), *value, w);
      const int64_t i = __shfl_xor_sync(mask(), static_cast<long long>(*index), w);
      const bool better = v > *value || (v == *value && i < *index);
      *value = better ? v : *value;
      *index = better ? i : *index;
    }
  }
#else  // nvcc's pass for the host, which runs none of this
  static FASTFI_HD int64_t rank() { return 0; }
  static FASTFI_HD void sync() {}
  static FASTFI_HD double sum(double x) { return x; }
  static FASTFI_HD void best(double*, int64_t*) {}
#endif
  static FASTFI_HD bool leads() { return rank() == 0; }
};

FASTFI_END
