// sum_i (v_i . c)^2 / lambda_i^2 over the eigenvalues above a cut of a symmetric matrix M.
//
// Householder reflections that begin with c make M tridiagonal; the implicit QL iteration then
// finds the eigenvalues and, of the eigenvectors, only their components along c (Golub and Welsch
// 1969). The errors are a few units of rounding of M's norm, which an unlikely class's small
// eigenvalues do not bear: the caller is told which matrices to solve otherwise.
#pragma once

#include "window_solve.h"

FASTFI_BEGIN

// One reflection of the last m rows and columns of M [n, n] that takes x [m] to a multiple of its
// first unit vector. Returns |x|; x is overwritten. p [m] is scratch. MS > 0 fixes m at compile
// time.
template <class V, int MS>
FASTFI_HD V reflect(V* FASTFI_RESTRICT a, int64_t n, int64_t m_, V* FASTFI_RESTRICT x,
                    V* FASTFI_RESTRICT p) {
  const int64_t m = MS > 0 ? MS : m_, first = n - m;
  const V square = dot(x, x, m);
  const Mask<V> live = square > 0.0;
  const V length = sqrt_of(square);
  x[0] = select(x[0] < 0.0, x[0] - length, x[0] + length);
  // 2 / |v|^2 with v = x + sign(x_0) |x| e_0: |v|^2 = 2 |x| |v_0|.
  const V size = length * abs_of(x[0]);
  const V beta = select(live, 1.0 / select(live, size, V{} + 1.0), V{});
  FASTFI_UNROLL
  for (int64_t i = 0; i < m; ++i) p[i] = a[packed(first + i, first + i)] * x[i];
  FASTFI_UNROLL
  for (int64_t i = 1; i < m; ++i) {
    const V* ai = a + packed(first + i, first);
    const V xi = x[i];
    V sum = V{};
    FASTFI_UNROLL_ROW
    for (int64_t j = 0; j < i; ++j) {
      const V aij = ai[j];
      sum += aij * x[j];
      p[j] += aij * xi;
    }
    p[i] += sum;
  }
  const V half = 0.5 * beta * dot(x, p, m);
  FASTFI_UNROLL
  for (int64_t i = 0; i < m; ++i) p[i] = beta * (p[i] - half * x[i]);
  FASTFI_UNROLL
  for (int64_t i = 0; i < m; ++i) {
    V* ai = a + packed(first + i, first);
    const V xi = x[i], pi = p[i];
    FASTFI_UNROLL_ROW
    for (int64_t j = 0; j <= i; ++j) ai[j] -= xi * p[j] + pi * x[j];
  }
  return length;
}

// The reflections after the first: columns n - m - 1 on. e in reverse order.
template <class V, int MS>
FASTFI_HD void tridiagonalise(V* a, int64_t n, int64_t m_, V* e, V* x, V* p) {
  const int64_t m = MS > 0 ? MS : m_, k = n - m - 1;
  FASTFI_UNROLL
  for (int64_t i = 0; i < m; ++i) x[i] = a[packed(k + 1 + i, k)];
  if (m < 2) {
    if (m == 1) e[0] = x[0];
    return;
  }
  e[m - 1] = reflect<V, MS>(a, n, m, x, p);
  if constexpr (MS > 1) tridiagonalise<V, MS - 1>(a, n, m - 1, e, x, p);
}

// One sweep of rotations from the bottom up to row l, in the lanes `turn`. A coupling up to `floor`
// ends one block's sweep and begins the next one's.
template <class V, int NS>
FASTFI_HD void ql_sweep(V* d, V* e, V* z, int64_t l, int64_t n_, Mask<V> turn, V shift, V floor,
                        V least_square) {
  const int64_t n = NS > 0 ? NS : n_;
  const V one = V{} + 1.0;
  V g = d[n - 1] - shift, s = one, c = one, p = V{};
  Mask<V> fresh = turn;  // lanes in which a block begins below row i + 1
  V below = d[n - 1];    // d[i + 1]
  V z1 = z[n - 1];
  FASTFI_UNROLL
  for (int64_t i = n - 2; i >= l; --i) {
    const Mask<V> split = abs_of(e[i]) <= floor;
    const V coupling = select(split, V{}, e[i]);
    const V f = s * coupling, b = c * coupling;
    // Vectors below the floor are noise, and inv_sqrt_of has its range.
    const V square = f * f + g * g;
    const Mask<V> live = square > least_square;
    const V inv = select(live, inv_sqrt_of(select(live, square, one)), V{});
    if (i + 1 < n - 1) e[i + 1] = select(turn, select(fresh, V{}, square * inv), e[i + 1]);
    s = f * inv;
    c = select(live, g * inv, one);
    g = below - p;
    const V r = (d[i] - g) * s + 2.0 * c * b;
    p = s * r;
    d[i + 1] = select(turn, g + p, d[i + 1]);
    const V z0 = z[i];
    z[i + 1] = select(turn, s * z0 + c * z1, z[i + 1]);
    z1 = c * z0 - s * z1;
    below = d[i];
    g = select(split, below - shift, c * r - b);
    s = select(split, one, s);
    c = select(split, one, c);
    p = select(split, V{}, p);
    fresh = split;
  }
  z[l] = select(turn, z1, z[l]);
  d[l] = select(turn, below - p, d[l]);
  e[l] = select(turn, g, e[l]);
}

// Implicit QL with Wilkinson's shifts on diagonal d [n] and subdiagonal e [n] (e[n - 1] unused); z
// [n] holds a row vector that turns along. A coupling up to `floor` counts as none. Lanes that have
// converged are left as they are; returns those that did.
template <class V, int NS>
FASTFI_HD Mask<V> tridiagonal_ql(V* d, V* e, V* z, int64_t n_, V floor) {
  const int64_t n = NS > 0 ? NS : n_;
  Mask<V> done = floor >= 0.0;
  const V least_square = select(floor * floor > 1e-280, floor * floor, V{} + 1e-280);
  FASTFI_UNROLL
  for (int64_t l = 0; l + 1 < n; ++l) {
    for (int sweep = 0;; ++sweep) {
      const Mask<V> turn = abs_of(e[l]) > floor;
      if (!any(turn)) break;
      if (sweep == 40) {
        done = done & negate(turn);
        break;
      }
      const V el = select(turn, e[l], V{} + 1.0);
      const V half = 0.5 * (d[l + 1] - d[l]), square = half * half + el * el;
      const V root = square * inv_sqrt_of(square);
      const V shift = d[l] - el * el / (half + select(half < 0.0, -root, root));
      ql_sweep<V, NS>(d, e, z, l, n, turn, shift, floor, least_square);
    }
  }
  return done;
}

FASTFI_HD int64_t spectral_scratch(int64_t r) { return 5 * r; }

// sum (v_i . c)^2 / lambda_i^power over the eigenvalues above eps^2 of M [r, r], and their number.
// a: M in rows 0..r-1, c in row r, and as much room again; overwritten. power 2 is for c = M u, 1
// for c = h itself. all: the sum where every eigenvalue is kept, negative if not known. Returns the
// lanes whose rounding errors may exceed the accuracy contract.
template <class V, int NS>
FASTFI_HD Mask<V> truncated_window(V* a, int64_t r_, double eps, int power, V all, V* scratch,
                                   V* fi_out, V* rank_out) {
  const int64_t r = NS > 0 ? NS : r_;
  const double cut = eps * eps;
  V* d = scratch;
  V* e = d + r;
  V* z = e + r;
  V* x = z + r;
  V* p = x + r;
  V trace = V{};
  FASTFI_UNROLL
  for (int64_t i = 0; i < r; ++i) trace += a[packed(i, i)];
  *fi_out = V{};
  *rank_out = V{};
  Mask<V> above = trace > cut;  // else no eigenvalue is
  // Squares of what follows must neither overflow nor underflow.
  const Mask<V> extreme = above & ((trace > 1e100) | (V{} + cut < 1e-100));
  above = above & negate(extreme);
  if (!any(above)) return extreme;

  const V rounding = trace * 2.220446049250313e-16;
  const Mask<V> known = all >= 0.0;
  if (any(known)) {
    V least = trace;
    FASTFI_UNROLL
    for (int64_t i = 0; i < r; ++i) least = select(a[packed(i, i)] < least, a[packed(i, i)], least);
    if (any(known & (least > cut))) {
      V* copy = a + packed(r + 1, 0);
      FASTFI_UNROLL
      for (int64_t e_ = 0; e_ < packed_size(r); ++e_) copy[e_] = a[e_];
      // Clear of the cut by more than rounding can move an eigenvalue.
      const Mask<V> whole =
          known & surely_above<V, NS>(copy, r, cut * (1.0 + 1e-6) + 64.0 * rounding);
      *fi_out = select(whole, all, V{});
      *rank_out = select(whole, V{} + static_cast<double>(r), V{});
      above = above & negate(whole);
      if (!any(above)) return extreme;
    }
  }

  V* c = a + packed(r, 0);
  const V length = reflect<V, NS>(a, r, r, c, p);
  // In reverse order: c's largest components, which stand first now, are to converge last.
  if constexpr (NS > 0)
    tridiagonalise<V, NS - 1>(a, r, r - 1, e, x, p);
  else
    for (int64_t m = r - 1; m > 0; --m) tridiagonalise<V, 0>(a, r, m, e, x, p);
  FASTFI_UNROLL
  for (int64_t i = 0; i < r; ++i) {
    d[r - 1 - i] = a[packed(i, i)];
    z[i] = V{};
  }
  z[r - 1] += 1.0;
  // Wholly below the cut: nothing to iterate on.
  FASTFI_UNROLL
  for (int64_t i = 0; i + 1 < r; ++i) e[i] = select(above, e[i], V{});
  // Couplings this small change no eigenvalue that is kept by more than the noise below.
  const V floor = select(rounding > cut * 1e-12, rounding, V{} + cut * 1e-12);
  const Mask<V> done = tridiagonal_ql<V, NS>(d, e, z, r, floor);

  // First-order bounds with w_i = v_i . c and a perturbation of M's entries by `noise`: kept
  // eigenvectors turn among themselves and towards those that are dropped.
  const V noise = (r > 16 ? 0.5 * static_cast<double>(r) : 8.0) * rounding + 4.0 * floor;
  V fi = V{}, rank = V{}, first = V{}, last = V{}, turned = V{}, dropped = V{}, highest = V{};
  Mask<V> doubtful = negate(done);
  FASTFI_UNROLL
  for (int64_t i = 0; i < r; ++i) {
    const Mask<V> keep = d[i] > cut;
    dropped += select(keep, V{}, abs_of(z[i]));
    highest = select(keep | (d[i] < highest), highest, d[i]);
    doubtful = doubtful | (abs_of(d[i] - cut) <= noise);
  }
  FASTFI_UNROLL
  for (int64_t i = 0; i < r; ++i) {
    const Mask<V> keep = above & (d[i] > cut);
    const V inv = select(keep, 1.0 / select(keep, d[i], V{} + 1.0), V{});
    const V part = z[i] * inv, most = power == 2 ? part * inv : part;
    fi += part * (power == 2 ? part : z[i]);
    first += abs_of(part);
    last += abs_of(most);
    turned += abs_of(most) / select(keep, d[i] - highest, V{} + 1.0);
    rank += select(keep, V{} + 1.0, V{});
  }
  *fi_out = select(above, fi * length * length, *fi_out);
  *rank_out = select(above, rank, *rank_out);
  const V error =
      2.0 * noise * (last * first + dropped * turned) + 8.0 * 2.220446049250313e-16 * last;
  // A fifth of the contract's 1e-8.
  return extreme | (above & (doubtful | ((error > fi * 2e-9) & (length > 0.0))));
}

FASTFI_END
