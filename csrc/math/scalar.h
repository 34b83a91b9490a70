// The one-problem-at-a-time "vector": a double. One CUDA thread, or one large problem on the CPU.
//
// Every formula in this folder is written against a value type V with a mask type, an index type
// and the functions below. lanes.h provides the same for several problems side by side.
#pragma once

#include <math.h>

#include "config.h"

FASTFI_BEGIN

template <class V>
struct Traits;

template <>
struct Traits<double> {
  using Mask = bool;
  using Index = int64_t;
  static constexpr int kLanes = 1;
};

template <class V>
using Mask = typename Traits<V>::Mask;
template <class V>
using Index = typename Traits<V>::Index;

FASTFI_HD double select(bool m, double a, double b) { return m ? a : b; }
FASTFI_HD int64_t select(bool m, int64_t a, int64_t b) { return m ? a : b; }
FASTFI_HD bool any(bool m) { return m; }
FASTFI_HD double sqrt_of(double x) { return sqrt(x); }
FASTFI_HD double inv_sqrt_of(double x) { return 1.0 / sqrt(x); }
FASTFI_HD double abs_of(double x) { return fabs(x); }
FASTFI_HD bool negate(bool m) { return !m; }
FASTFI_HD double exp_of(double x) { return exp(x); }
FASTFI_HD double gather(const double* base, int64_t at) { return base[at]; }
FASTFI_HD double to_value(int64_t i) { return static_cast<double>(i); }

// Base-2 logarithm, wrong by at most 0.09: it only ranks pivots.
FASTFI_HD double rough_log2(double x) {
  union {
    double d;
    int64_t i;
  } u;
  u.d = x;
  return static_cast<double>(u.i) * 0x1p-52 - 1023.0;
}

FASTFI_END

// Templates find only the overloads for the compiler's vectors that were declared before them.
#ifndef __CUDACC__
#include "lanes.h"
#endif
