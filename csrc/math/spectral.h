// sum_i (v_i . c)^2 / lambda_i^2 over the eigenvalues above a cut of a symmetric matrix M.
//
// Householder reflections that begin with c make M tridiagonal; the implicit QL iteration then finds
// the eigenvalues and, of the eigenvectors, only their components along c (Golub and Welsch 1969).
// The errors are a few units of rounding of M's norm, which an unlikely class's small eigenvalues do
// not bear: the caller is told which matrices to solve otherwise.
#pragma once

#include "window_solve.h"

FASTFI_BEGIN

// One reflection of rows and columns first..n-1 of M that takes x [n - first] to a multiple of its
// first unit vector. Returns |x|; x is overwritten. p [n - first] is scratch.
template <class V>
FASTFI_HD V reflect(V* a, int64_t first, int64_t n, V* x, V* p) {
  const int64_t m = n - first;
  const V square = dot(x, x, m);
  const Mask<V> live = square > 0.0;
  const V length = sqrt_of(square);
  x[0] = select(x[0] < 0.0, x[0] - length, x[0] + length);
  // 2 / |v|^2 with v = x + sign(x_0) |x| e_0: |v|^2 = 2 |x| |v_0|.
  const V size = length * select(x[0] < 0.0, -x[0], x[0]);
  const V beta = select(live, 1.0 / select(live, size, V{} + 1.0), V{});
  for (int64_t i = 0; i < m; ++i) p[i] = V{};
  for (int64_t i = 0; i < m; ++i) {
    const V* ai = a + packed(first + i, first);
    V sum = ai[i] * x[i];
    for (int64_t j = 0; j < i; ++j) {
      sum += ai[j] * x[j];
      p[j] += ai[j] * x[i];
    }
    p[i] += sum;
  }
  const V half = 0.5 * beta * dot(x, p, m);
  for (int64_t i = 0; i < m; ++i) p[i] = beta * (p[i] - half * x[i]);
  for (int64_t i = 0; i < m; ++i) {
    V* ai = a + packed(first + i, first);
    for (int64_t j = 0; j <= i; ++j) ai[j] -= x[i] * p[j] + p[i] * x[j];
  }
  return length;
}

// Implicit QL with Wilkinson's shifts on diagonal d [n] and subdiagonal e [n] (e[n - 1] unused); z
// [n] holds a row vector that turns along. Lanes that have converged are left as they are. Returns
// the lanes that converged.
template <class V>
FASTFI_HD Mask<V> tridiagonal_ql(V* d, V* e, V* z, int64_t n, V floor) {
  constexpr double kEps = 1.1102230246251565e-16;
  Mask<V> done = floor >= 0.0;
  // Rotations of vectors below the floor turn noise, and inv_sqrt_of has its range.
  const V least_square = select(floor * floor > 1e-280, floor * floor, V{} + 1e-280);
  for (int64_t l = 0; l + 1 < n; ++l) {
    for (int sweep = 0;; ++sweep) {
      const V small = kEps * (abs_of(d[l]) + abs_of(d[l + 1])) + floor;
      const Mask<V> turn = abs_of(e[l]) > small;
      if (!any(turn)) break;
      if (sweep == 40) {
        done = done & (abs_of(e[l]) <= small);
        break;
      }
      const V el = select(turn, e[l], V{} + 1.0);
      V g = (d[l + 1] - d[l]) / (2.0 * el);
      const V root = sqrt_of(g * g + 1.0);
      g = d[n - 1] - d[l] + el / (g + select(g < 0.0, -root, root));
      V s = V{} + 1.0, c = s, p = V{};
      for (int64_t i = n - 2; i >= l; --i) {
        const V f = s * e[i], b = c * e[i];
        const V square = f * f + g * g;
        const Mask<V> live = square > least_square;
        const V inv = select(live, inv_sqrt_of(select(live, square, V{} + 1.0)), V{});
        if (i + 1 < n - 1) e[i + 1] = select(turn, square * inv, e[i + 1]);
        s = f * inv;
        c = select(live, g * inv, V{} + 1.0);
        g = d[i + 1] - p;
        const V r = (d[i] - g) * s + 2.0 * c * b;
        p = s * r;
        d[i + 1] = select(turn, g + p, d[i + 1]);
        g = c * r - b;
        const V z1 = z[i + 1], z0 = z[i];
        z[i + 1] = select(turn, s * z0 + c * z1, z1);
        z[i] = select(turn, c * z0 - s * z1, z0);
      }
      d[l] = select(turn, d[l] - p, d[l]);
      e[l] = select(turn, g, e[l]);
    }
  }
  return done;
}

FASTFI_HD int64_t spectral_scratch(int64_t r) { return 5 * r; }

// a: sums of (q, h)(q, h)^T, r + 1 rows, overwritten. Writes FI and the number of eigenvalues above
// eps^2; returns the lanes whose rounding errors may exceed the accuracy contract.
template <class V, int NS>
FASTFI_HD Mask<V> truncated_window(V* a, int64_t r_, double eps, V* scratch, V* fi_out,
                                   V* rank_out) {
  const int64_t r = NS > 0 ? NS : r_;
  const double cut = eps * eps;
  V* d = scratch;
  V* e = d + r;
  V* z = e + r;
  V* x = z + r;
  V* p = x + r;
  V trace = V{};
  for (int64_t i = 0; i < r; ++i) trace += a[packed(i, i)];
  *fi_out = V{};
  *rank_out = V{};
  const Mask<V> above = trace > cut;  // else no eigenvalue is
  if (!any(above)) return above;

  V* c = a + packed(r, 0);
  const V length = reflect(a, 0, r, c, p);
  for (int64_t k = 0; k + 1 < r; ++k) {
    for (int64_t i = k + 1; i < r; ++i) x[i - k - 1] = a[packed(i, k)];
    if (k + 2 < r)
      e[k] = reflect(a, k + 1, r, x, p);
    else
      e[k] = x[0];
  }
  for (int64_t i = 0; i < r; ++i) {
    d[i] = a[packed(i, i)];
    z[i] = V{};
  }
  z[0] += 1.0;
  // Wholly below the cut: nothing to iterate on.
  for (int64_t i = 0; i + 1 < r; ++i) e[i] = select(above, e[i], V{});
  const Mask<V> done = tridiagonal_ql(d, e, z, r, trace * 1e-18);

  const V noise = trace * (8.0 * 2.220446049250313e-16);
  V fi = V{}, rank = V{}, error = V{};
  Mask<V> doubtful = above & (noise < 0.0);
  for (int64_t i = 0; i < r; ++i) {
    const Mask<V> keep = above & (d[i] > cut);
    const V inv = select(keep, 1.0 / select(keep, d[i], V{} + 1.0), V{});
    const V part = z[i] * inv;
    fi += part * part;
    error += abs_of(part) * inv + part * part * inv * trace;
    rank += select(keep, V{} + 1.0, V{});
    doubtful = doubtful | (above & (abs_of(d[i] - cut) <= noise));
  }
  *fi_out = select(above, fi * length * length, V{});
  *rank_out = rank;
  // 16 eps times the bound on the sum's first-order error, against the contract of 1e-8.
  const Mask<V> wrong = error * (16.0 * 2.220446049250313e-16) > fi * 2e-9;
  return above & (doubtful | (wrong & (length > 0.0)) | negate(done));
}

FASTFI_END
