// Small dense pieces: dot products, Cholesky factorisation, forward substitution.
#pragma once

#include "team.h"

FASTFI_BEGIN

// Partial sums, so that additions need not wait for one another: two where V is already as wide as
// the machine, sixteen for a plain double.
template <class V>
FASTFI_HD V dot(const V* a, const V* b, int64_t n) {
  V even = V{}, odd = V{};
  int64_t i = 0;
  FASTFI_UNROLL
  for (; i + 2 <= n; i += 2) {
    even += a[i] * b[i];
    odd += a[i + 1] * b[i + 1];
  }
  if (i < n) even += a[i] * b[i];
  return even + odd;
}

#ifndef FASTFI_DEVICE
template <>
inline double dot<double>(const double* a, const double* b, int64_t n) {
  double part[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int l = 0; l < 16; ++l) part[l] += a[i + l] * b[i + l];
  double sum = 0.0;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (int w = 8; w > 0; w /= 2)
    for (int l = 0; l < w; ++l) part[l] += part[l + w];
  return sum + part[0];
}
#endif

// A team's dot product, of elements that FASTFI_EACH deals out; every member gets it.
template <class T, class V>
FASTFI_HD V team_dot(const V* a, const V* b, int64_t n) {
  if constexpr (T::kSize == 1) {
    return dot(a, b, n);
  } else {
    V sum = V{};
    FASTFI_EACH(T, i, 0, n) sum += a[i] * b[i];
    return T::sum(sum);
  }
}

// 1 / sqrt(pivot), and 0 for a pivot that rounding made non-positive.
template <class V>
FASTFI_HD V inverse_root(V pivot) {
  const Mask<V> positive = pivot > 0.0;
  return select(positive, 1.0 / sqrt_of(select(positive, pivot, V{} + 1.0)), V{});
}

// The lower triangle of A [n, n] (row stride ld) becomes C with C C^T = A; the diagonal of A is
// replaced by 1 / C_ii. A pivot that rounding made non-positive contributes nothing. A team of
// several also copies C to the upper triangle, where its columns lie as rows.
template <class V, class T = Alone>
FASTFI_HD void cholesky(V* a, int64_t n, int64_t ld) {
  if constexpr (T::kSize > 1) {
    for (int64_t j = 0; j < n; ++j) {
      V* aj = a + j * ld;
      const V inv = inverse_root(aj[j]);
      T::sync();
      FASTFI_EACH(T, k, j, n) aj[k] = k == j ? inv : a[k * ld + j] * inv;
      T::sync();
      for (int64_t i = j + 1; i < n; ++i) {
        const V l = aj[i];
        FASTFI_EACH(T, k, j + 1, i + 1) a[i * ld + k] -= l * aj[k];
      }
      T::sync();
    }
  } else {
    FASTFI_UNROLL
    for (int64_t i = 0; i < n; ++i) {
      V* ai = a + i * ld;
      FASTFI_UNROLL
      for (int64_t j = 0; j < i; ++j) {
        V* aj = a + j * ld;
        ai[j] = (ai[j] - dot(ai, aj, j)) * aj[j];
      }
      ai[i] = inverse_root(ai[i] - dot(ai, ai, i));
    }
  }
}

// x becomes C^-1 x, with C as cholesky() leaves it.
template <class V, class T = Alone>
FASTFI_HD void forward_substitute(const V* c, int64_t n, int64_t ld, V* x) {
  if constexpr (T::kSize > 1) {
    for (int64_t i = 0; i < n; ++i) {
      const V* ci = c + i * ld;  // column i, as cholesky() copied it
      const V xi = x[i] * ci[i];
      T::sync();
      FASTFI_EACH(T, k, i, n) x[k] = k == i ? xi : x[k] - ci[k] * xi;
      T::sync();
    }
  } else {
    FASTFI_UNROLL
    for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - dot(c + i * ld, x, i)) * c[i * ld + i];
  }
}

FASTFI_END
