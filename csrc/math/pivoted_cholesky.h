// Pivoted Cholesky of a Gram matrix: the rank of the rows, and their coordinates in an orthonormal
// basis of their span. The pivot is the row with the largest residual, so the factorisation is
// backward stable, and a residual of the order of rounding means dependence.
#pragma once

#include "linalg.h"

FASTFI_BEGIN

// N [n, n] symmetric; rows 0..r-1 may become pivots, further rows are carried along.
// Writes factor [r, n] (row s is column s of L, N = L L^T on rows 0..r-1; zero past the rank) and
// *smallest, the last pivot's residual. residual [r] is scratch. Returns the rank: the number of
// steps whose residual exceeded tolerance * max diag N. NS > 0 fixes r at compile time.
template <class V, int NS, class T = Alone>
FASTFI_HD V pivoted_cholesky(const V* gram, int64_t n, int64_t r_, double tolerance, V* factor,
                             V* residual, V* largest_out, V* smallest_out) {
  const int64_t r = NS > 0 ? NS : r_;
  V largest = V{};
  FASTFI_EACH(T, k, 0, r) {
    residual[k] = gram[k * n + k];
    largest = select(residual[k] > largest, residual[k], largest);
  }
  Index<V> at = Index<V>{};
  T::best(&largest, &at);
  const V cut = largest * tolerance;
  V rank = V{}, smallest = largest;
  int64_t step = 0;
  for (; step < r; ++step) {
    V best = cut;
    Index<V> b = Index<V>{} - 1;
    FASTFI_EACH(T, k, 0, r) {
      const Mask<V> better = residual[k] > best;
      best = select(better, residual[k], best);
      b = select(better, Index<V>{} + k, b);
    }
    T::best(&best, &b);
    const Mask<V> ok = b >= 0;
    if (!any(ok)) break;
    rank += select(ok, V{} + 1.0, V{});
    smallest = select(ok, best, smallest);
    const V inv = select(ok, 1.0 / sqrt_of(select(ok, best, V{} + 1.0)), V{});
    b = select(ok, b, Index<V>{});
    V* column = factor + step * n;
    FASTFI_EACH(T, k, 0, n) column[k] = gather(gram, b * n + k);
    for (int64_t j = 0; j < step; ++j) {
      const V* earlier = factor + j * n;
      const V at_pivot = gather(earlier, b);
      FASTFI_EACH(T, k, 0, n) column[k] -= at_pivot * earlier[k];
    }
    FASTFI_EACH(T, k, 0, n) column[k] *= inv;
    FASTFI_EACH(T, k, 0, r) {
      // In earlier pivots' rows the entry is rounding noise where a zero belongs.
      const Mask<V> taken = residual[k] < 0.0;
      column[k] = select(taken, V{}, column[k]);
      const V left = residual[k] - column[k] * column[k];
      residual[k] = select(left > 0.0, left, V{});
      residual[k] = select(taken | (ok & (b == k)), V{} - 1.0, residual[k]);
    }
    T::sync();
  }
  for (; step < r; ++step) FASTFI_EACH(T, k, 0, n) factor[step * n + k] = V{};
  T::sync();
  *largest_out = largest;
  *smallest_out = smallest;
  return rank;
}

FASTFI_END
