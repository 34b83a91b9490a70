// Sums of a cotangent over positions, plain and times a factor: the gradients of a norm layer's bias
// and weight, from one reading of the cotangent. Products and sums in double.
#pragma once

#include "../math/lanes.h"
#include "gram_tiles.h"
#include "kernels.h"

FASTFI_BEGIN

inline int64_t sums_units(const SumsProblem& p) { return p.count; }

template <class T>
void sum_channels(const SumsProblem& p, int64_t begin, int64_t end) {
  typedef T Narrow __attribute__((vector_size(kLanes * sizeof(T)), aligned(sizeof(T))));
  T* products = static_cast<T*>(p.out);
  T* sums = products + p.count;
  for (int64_t c = begin; c < end; ++c) {
    const T* d = static_cast<const T*>(p.d) + c * p.positions;
    const T* f = static_cast<const T*>(p.factor) + c * p.positions;
    double weighted = 0.0, plain = 0.0;
    int64_t t = 0;
    if (p.positions >= 2 * kLanes) {
      VecD w[2] = {}, s[2] = {};
      for (; t + 2 * kLanes <= p.positions; t += 2 * kLanes)
        for (int i = 0; i < 2; ++i) {
          const int64_t at = t + i * kLanes;
          const VecD x =
              __builtin_convertvector(*reinterpret_cast<const Narrow*>(d + at), VecD);
          const VecD y =
              __builtin_convertvector(*reinterpret_cast<const Narrow*>(f + at), VecD);
          w[i] += x * y;
          s[i] += x;
        }
      weighted = lane_sum(w[0] + w[1]);
      plain = lane_sum(s[0] + s[1]);
    }
    for (; t < p.positions; ++t) {
      weighted += static_cast<double>(d[t]) * static_cast<double>(f[t]);
      plain += static_cast<double>(d[t]);
    }
    products[c] = static_cast<T>(weighted);
    sums[c] = static_cast<T>(plain);
  }
}

inline void channel_sums(const SumsProblem& p, int64_t begin, int64_t end, double*) {
  if (p.is_double)
    sum_channels<double>(p, begin, end);
  else
    sum_channels<float>(p, begin, end);
}

FASTFI_END
