// Sums of a cotangent over positions, plain and times a factor: the gradients of a norm layer's
// bias and weight, from one reading of the cotangent. Products and sums in double.
#pragma once

#include "../math/lanes.h"
#include "gram_tiles.h"
#include "kernels.h"

FASTFI_BEGIN

// The sum of all lanes, by halves.
inline double halved_sum(VecD x) {
  alignas(sizeof(VecD)) double t[kLanes];
  *reinterpret_cast<VecD*>(t) = x;
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) t[l] += t[l + half];
  return t[0];
}

// A unit is one sample of one item.
inline int64_t sums_units(const SumsProblem& p) { return p.count * p.batch; }

template <class T>
void sum_channels(const T* d, const T* f, int64_t channels, int64_t positions, T* products,
                  T* sums) {
  typedef T Narrow __attribute__((vector_size(kLanes * sizeof(T)), aligned(sizeof(T))));
  if (positions == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      products[c] = d[c] * f[c];
      sums[c] = d[c];
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c, d += positions, f += positions) {
    double weighted = 0.0, plain = 0.0;
    int64_t t = 0;
    if (positions >= 2 * kLanes) {
      VecD w[2] = {}, s[2] = {};
      for (; t + 2 * kLanes <= positions; t += 2 * kLanes)
        for (int i = 0; i < 2; ++i) {
          const int64_t at = t + i * kLanes;
          const VecD x = __builtin_convertvector(*reinterpret_cast<const Narrow*>(d + at), VecD);
          const VecD y = __builtin_convertvector(*reinterpret_cast<const Narrow*>(f + at), VecD);
          w[i] += x * y;
          s[i] += x;
        }
      weighted = halved_sum(w[0] + w[1]);
      plain = halved_sum(s[0] + s[1]);
    }
    for (; t < positions; ++t) {
      weighted += static_cast<double>(d[t]) * static_cast<double>(f[t]);
      plain += static_cast<double>(d[t]);
    }
    products[c] = static_cast<T>(weighted);
    sums[c] = static_cast<T>(plain);
  }
}

template <class T>
void sum_units(const SumsProblem& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const SumsItem& item = p.items[unit / p.batch];
    const int64_t sample = unit % p.batch, offset = sample * item.channels * item.positions;
    T* out = static_cast<T*>(p.out) + sample * p.columns + item.column;
    sum_channels(static_cast<const T*>(item.d) + offset,
                 static_cast<const T*>(item.factor) + offset, item.channels, item.positions, out,
                 out + item.channels);
  }
}

inline void channel_sums(const SumsProblem& p, int64_t begin, int64_t end, double*) {
  if (p.is_double)
    sum_units<double>(p, begin, end);
  else
    sum_units<float>(p, begin, end);
}

FASTFI_END
