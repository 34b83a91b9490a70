// Solves of windows from packed sums: entry (i, j <= i) of a symmetric matrix at i (i + 1) / 2 + j.
#pragma once

#include "linalg.h"

FASTFI_BEGIN

FASTFI_HD int64_t packed(int64_t i, int64_t j) { return i * (i + 1) / 2 + j; }
FASTFI_HD int64_t packed_size(int64_t n) { return n * (n + 1) / 2; }

// Column j of L D L^T: rows j + 1 .. rows - 1 of `a` lose what pivot j explains. Columns from
// `columns` on are left alone.
template <class V>
FASTFI_HD void eliminate(V* a, int64_t j, int64_t rows, int64_t columns, V inv) {
  FASTFI_UNROLL
  for (int64_t i = j + 1; i < rows; ++i) {
    const V l = a[packed(i, j)] * inv;
    const int64_t last = i < columns ? i : columns - 1;
    V* ai = a + packed(i, 0);
    FASTFI_UNROLL_ROW
    for (int64_t k = j + 1; k <= last; ++k) ai[k] -= l * a[packed(k, j)];
  }
}

// Which matrices [r, r] have no eigenvalue up to `shift`: by the pivots of what is left when it is
// taken from the diagonal. Overwrites a.
template <class V, int NS>
FASTFI_HD Mask<V> surely_above(V* a, int64_t r_, V shift) {
  const int64_t r = NS > 0 ? NS : r_;
  FASTFI_UNROLL
  for (int64_t i = 0; i < r; ++i) a[packed(i, i)] -= shift;
  Mask<V> sure = a[0] > 0.0;
  FASTFI_UNROLL
  for (int64_t j = 0; j < r; ++j) {
    const V pivot = a[packed(j, j)];
    sure = sure & (pivot > 0.0);
    if (!any(sure)) break;
    eliminate(a, j, r, r, 1.0 / select(pivot > 0.0, pivot, V{} + 1.0));
  }
  return sure;
}

// Which Gram matrices N [r, r] pivoted Cholesky surely finds of full rank: each of its residuals is
// at least the smallest eigenvalue. Overwrites a.
template <class V, int NS>
FASTFI_HD Mask<V> surely_full_rank(V* a, int64_t r_, double tolerance) {
  const int64_t r = NS > 0 ? NS : r_;
  V largest = V{};
  FASTFI_UNROLL
  for (int64_t i = 0; i < r; ++i) {
    const V x = a[packed(i, i)];
    largest = select(x > largest, x, largest);
  }
  return surely_above<V, NS>(a, r, 2.0 * tolerance * largest) & (largest > 0.0);
}

// Three ways to FI_tau from a window's sums: u^T (M + tau I)^-1 c where h = Q^T u and c = M u;
// (h.h - c^T (M + tau I)^-1 c) / tau where h is no combination of the classes, c = Q h; and
// c^T (M + tau I)^-1 c where M is the metric of the pixels themselves and c is h.
enum class DampedForm { kClasses, kRow, kPixels };

// a: M in rows 0..r-1, c and (kRow) h.h in row r, and room for one row more; overwritten. u [r],
// for kClasses. tau > 0.
template <class V, int NS>
FASTFI_HD V damped_window(V* a, int64_t r_, DampedForm form, const double* u, double tau) {
  const int64_t r = NS > 0 ? NS : r_;
  const bool own = form == DampedForm::kClasses;
  const int64_t rows = own ? r + 2 : r + 1;
  V* c = a + packed(r, 0);
  V* right = own ? a + packed(r + 1, 0) : c;
  const V square = c[r];
  FASTFI_UNROLL
  for (int64_t i = 0; i < r; ++i) {
    a[packed(i, i)] += tau;
    if (own) right[i] = V{} + u[i];
  }
  V fi = V{};
  FASTFI_UNROLL
  for (int64_t j = 0; j < r; ++j) {
    const V pivot = a[packed(j, j)];
    // A pivot that rounding made non-positive contributes nothing.
    const Mask<V> positive = pivot > 0.0;
    const V inv = select(positive, 1.0 / select(positive, pivot, V{} + 1.0), V{});
    fi += right[j] * c[j] * inv;
    eliminate(a, j, rows, r, inv);
  }
  if (form == DampedForm::kRow) fi = (square - fi) / tau;
  return select(fi > 0.0, fi, V{});
}

FASTFI_END
