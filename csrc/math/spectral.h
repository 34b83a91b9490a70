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
// [n] holds a row vector that turns along. A coupling up to `floor` counts as none. Lanes that have
// converged are left as they are; returns those that did.
template <class V>
FASTFI_HD Mask<V> tridiagonal_ql(V* d, V* e, V* z, int64_t n, V floor) {
  const V one = V{} + 1.0;
  Mask<V> done = floor >= 0.0;
  // Rotations of vectors below the floor turn noise, and inv_sqrt_of has its range.
  const V least_square = select(floor * floor > 1e-280, floor * floor, V{} + 1e-280);
  for (int64_t l = 0; l + 1 < n; ++l) {
    for (int sweep = 0;; ++sweep) {
      const Mask<V> turn = abs_of(e[l]) > floor;
      if (!any(turn)) break;
      if (sweep == 40) {
        done = done & negate(turn);
        break;
      }
#ifdef FASTFI_COUNT
      extern long g_count[8];
      g_count[6]++; g_count[5] += n - 1 - l;
#endif
      const V el = select(turn, e[l], one);
      V g = (d[l + 1] - d[l]) / (2.0 * el);
      const V root = sqrt_of(g * g + 1.0);
      const V shift = d[l] - el / (g + select(g < 0.0, -root, root));
      g = d[n - 1] - shift;
      V s = one, c = one, p = V{};
      Mask<V> fresh = turn;  // lanes in which the chase begins below i + 1
      for (int64_t i = n - 2; i >= l; --i) {
        // Where the matrix splits, the chase of the lower block ends and another begins.
        const Mask<V> split = abs_of(e[i]) <= floor;
        const V coupling = select(split, V{}, e[i]);
        const V f = s * coupling, b = c * coupling;
        const V square = f * f + g * g;
        const Mask<V> live = square > least_square;
        const V inv = select(live, inv_sqrt_of(select(live, square, one)), V{});
        if (i + 1 < n - 1) e[i + 1] = select(turn, select(fresh, V{}, square * inv), e[i + 1]);
        s = f * inv;
        c = select(live, g * inv, one);
        g = d[i + 1] - p;
        const V r = (d[i] - g) * s + 2.0 * c * b;
        p = s * r;
        d[i + 1] = select(turn, g + p, d[i + 1]);
        const V z1 = z[i + 1], z0 = z[i];
        z[i + 1] = select(turn, s * z0 + c * z1, z1);
        z[i] = select(turn, c * z0 - s * z1, z0);
        g = select(split, d[i] - shift, c * r - b);
        s = select(split, one, s);
        c = select(split, one, c);
        p = select(split, V{}, p);
        fresh = split;
      }
      d[l] = select(turn, d[l] - p, d[l]);
      e[l] = select(turn, g, e[l]);
    }
  }
  return done;
}

FASTFI_HD int64_t spectral_scratch(int64_t r) { return 5 * r; }

// sum (v_i . c)^2 / lambda_i^power over the eigenvalues above eps^2 of M [r, r], and their number.
// a: M in rows 0..r-1, c in row r; overwritten. power 2 is for c = M u, 1 for c = h itself. Returns
// the lanes whose rounding errors may exceed the accuracy contract.
template <class V, int NS>
FASTFI_HD Mask<V> truncated_window(V* a, int64_t r_, double eps, int power, V* scratch, V* fi_out,
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
    // In reverse order: c's largest components, which stand first now, are to converge last.
    if (k + 2 < r)
      e[r - 2 - k] = reflect(a, k + 1, r, x, p);
    else
      e[r - 2 - k] = x[0];
  }
  for (int64_t i = 0; i < r; ++i) {
    d[r - 1 - i] = a[packed(i, i)];
    z[i] = V{};
  }
  z[r - 1] += 1.0;
  // Wholly below the cut: nothing to iterate on.
  for (int64_t i = 0; i + 1 < r; ++i) e[i] = select(above, e[i], V{});
  // Couplings this small change no eigenvalue that is kept by more than the noise below.
  const V rounding = trace * 2.220446049250313e-16;
  const V floor = select(rounding > cut * 1e-10, rounding, V{} + cut * 1e-10);
  const Mask<V> done = tridiagonal_ql(d, e, z, r, floor);

  const V noise = 4.0 * floor;
  V fi = V{}, rank = V{}, error = V{};
  Mask<V> doubtful = negate(done);
  for (int64_t i = 0; i < r; ++i) {
    const Mask<V> keep = above & (d[i] > cut);
    const V inv = select(keep, 1.0 / select(keep, d[i], V{} + 1.0), V{});
    const V part = z[i] * inv, other = power == 2 ? part : z[i];
    fi += part * other;
    error += abs_of(other) * inv + part * other * inv * trace;
    rank += select(keep, V{} + 1.0, V{});
    doubtful = doubtful | (abs_of(d[i] - cut) <= noise);
  }
  *fi_out = select(above, fi * length * length, V{});
  *rank_out = rank;
  // 8 eps times the bound on the sum's first-order error, against the contract of 1e-8.
  const Mask<V> wrong = (error * (8.0 * 2.220446049250313e-16) > fi * 5e-9) & (length > 0.0);
  return above & (doubtful | wrong);
}

FASTFI_END
