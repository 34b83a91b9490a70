// A basis among the rows themselves, chosen by weight times residual: orthogonalisation of the rows
// in the coordinates that pivoted_cholesky() found.
//
// The choice by probability is what keeps the exact solve accurate, but a pivot may then have a
// small residual beside rows that are large. On the Gram matrix that amplifies rounding (1e-16 of
// the square, 1e-8 of the length) until a dependent row looks independent. On coordinate vectors
// rounding is 1e-16 of the length itself.
#pragma once

#include "linalg.h"

FASTFI_BEGIN

FASTFI_HD int64_t weighted_pivots_scratch(int64_t d, int64_t r) { return d * d + d + 2 * r; }

// left [d, n]: coordinate i of row k at i * n + k; overwritten. weight2 [r]: base-2 logarithms of
// the weights, -infinity excludes a row; rows r..n-1 are carried along. cut: residual (a squared
// length) up to which a row is no pivot; dead: up to which it counts as dependent on the pivots, at
// most cut.
// Writes column [d, n] (row s: the rows' coordinates along pivot direction s, zero past the rank),
// inv_pivot [d], pivot [d]; returns the rank.
template <class V, class T = Alone>
FASTFI_HD V weighted_pivots(V* left, const V* weight2, int64_t d, int64_t n, int64_t r, V cut,
                            V dead, V* column, V* inv_pivot, Index<V>* pivot, V* scratch) {
  V* basis = scratch;  // [d, d], orthonormal rows
  V* q = basis + d * d;
  V* taken = q + d;  // [r], 1 for pivots
  V* residual = taken + r;
  FASTFI_EACH(T, k, 0, r) taken[k] = V{};
  V rank = V{};
  int64_t step = 0;
  for (; step < d; ++step) {
    FASTFI_EACH(T, k, 0, r) residual[k] = V{};
    for (int64_t i = 0; i < d; ++i)
      FASTFI_EACH(T, k, 0, r) residual[k] += left[i * n + k] * left[i * n + k];
    V best = V{} - 1e300;
    Index<V> b = Index<V>{};
    FASTFI_EACH(T, k, 0, r) {
      const V score = weight2[k] + rough_log2(residual[k]);
      const Mask<V> better = (residual[k] > cut) & (taken[k] < 0.5) & (score > best);
      best = select(better, score, best);
      b = select(better, Index<V>{} + k, b);
    }
    T::best(&best, &b);
    const Mask<V> ok = best > -1e300;
    if (!any(ok)) break;
    rank += select(ok, V{} + 1.0, V{});

    // The direction of a small residual has lost digits: orthogonalise it a second time.
    FASTFI_EACH(T, i, 0, d) q[i] = gather(left + i * n, b);
    for (int64_t j = 0; j < step; ++j) {
      const V* e = basis + j * d;
      const V along = team_dot<T>(e, q, d);
      FASTFI_EACH(T, i, 0, d) q[i] -= along * e[i];
    }
    const V square = team_dot<T>(q, q, d);
    const Mask<V> live = ok & (square > 0.0);
    const V length = sqrt_of(select(live, square, V{} + 1.0));
    const V inv = select(live, 1.0 / length, V{});
    FASTFI_EACH(T, i, 0, d) q[i] = basis[step * d + i] = q[i] * inv;
    T::sync();

    V* c = column + step * n;
    FASTFI_EACH(T, k, 0, n) c[k] = V{};
    for (int64_t i = 0; i < d; ++i) FASTFI_EACH(T, k, 0, n) c[k] += q[i] * left[i * n + k];
    // A dependent row holds a zero along this and all later directions. What rounding left there
    // would, squared and divided by the probability of an unlikely pivot, outweigh FI itself.
    FASTFI_EACH(T, k, 0, r)
    c[k] = select((residual[k] <= dead) & (taken[k] < 0.5), V{}, c[k]);
    for (int64_t i = 0; i < d; ++i) FASTFI_EACH(T, k, 0, n) left[i * n + k] -= q[i] * c[k];
    FASTFI_EACH(T, k, 0, r) {
      const Mask<V> chosen = live & (b == k);
      // An earlier pivot's entry is rounding noise where a zero belongs.
      c[k] = select(taken[k] > 0.5, V{}, select(chosen, length, c[k]));
      taken[k] = select(chosen, V{} + 1.0, taken[k]);
    }
    if (T::leads()) {
      inv_pivot[step] = inv;
      pivot[step] = b;
    }
    T::sync();
  }
  for (; step < d; ++step) {
    if (T::leads()) {
      inv_pivot[step] = V{};
      pivot[step] = Index<V>{};
    }
    FASTFI_EACH(T, k, 0, n) column[step * n + k] = V{};
  }
  T::sync();
  return rank;
}

FASTFI_END
