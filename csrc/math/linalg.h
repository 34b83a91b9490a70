// Small dense pieces: dot products, Cholesky factorisation, forward substitution.
#pragma once

#include "scalar.h"

FASTFI_BEGIN

// Partial sums, so that additions need not wait for one another: two where V is already as wide as
// the machine, sixteen for a plain double.
template <class V>
FASTFI_HD V dot(const V* a, const V* b, int64_t n) {
  V even = V{}, odd = V{};
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    even += a[i] * b[i];
    odd += a[i + 1] * b[i + 1];
  }
  if (i < n) even += a[i] * b[i];
  return even + odd;
}

#ifndef __CUDACC__
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

// The lower triangle of A [n, n] (row stride ld) becomes C with C C^T = A; the diagonal of A is
// replaced by 1 / C_ii. A pivot that rounding made non-positive contributes nothing.
template <class V>
FASTFI_HD void cholesky(V* a, int64_t n, int64_t ld) {
  for (int64_t i = 0; i < n; ++i) {
    V* ai = a + i * ld;
    for (int64_t j = 0; j < i; ++j) {
      V* aj = a + j * ld;
      ai[j] = (ai[j] - dot(ai, aj, j)) * aj[j];
    }
    const V pivot = ai[i] - dot(ai, ai, i);
    const Mask<V> positive = pivot > 0.0;
    ai[i] = select(positive, 1.0 / sqrt_of(select(positive, pivot, V{} + 1.0)), V{});
  }
}

// x becomes C^-1 x, with C as cholesky() leaves it.
template <class V>
FASTFI_HD void forward_substitute(const V* c, int64_t n, int64_t ld, V* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - dot(c + i * ld, x, i)) * c[i * ld + i];
}

FASTFI_END
