// FI = h^T G^+ h by the definition, for any grading of the probabilities (Shu and Zhu 2019, eq. 6).
//
// At full rank FI = sum_k g_k^2 / P_k, and the Gram matrix matters only for its rank. Below it,
// with pivot rows b_i of the contrasts, X expresses every contrast row as a combination of them.
// Z_ki = X_ki sqrt(P_k / P_b_i) holds the identity and, because pivots were chosen by probability,
// moderate entries elsewhere: Z^T Z = C C^T is well conditioned however graded P is. In these
// coordinates G = C (I - v v^T) C^T with v = C^-1 Z^T sqrt(P), and by Sherman and Morrison
// FI = |d|^2 + (d.v)^2 / (1 - |v|^2), d = C^-1 target: a sum of squares, nothing cancels.
#pragma once

#include "classes.h"
#include "pivoted_cholesky.h"
#include "weighted_pivots.h"

FASTFI_BEGIN

// FI at full rank, where G's range holds every contrast: sum_k g_k^2 / P_k, for objectives in terms
// of the classes. sqrt_p [classes].
template <class V, int NS = 0, class T = Alone>
FASTFI_HD V full_rank_influence(const V* sqrt_p, int64_t classes, Index<V> label, const V* grad,
                                Objective kind) {
  V fi = V{};
  if (kind == Objective::kCrossEntropy) {
    FASTFI_EACH(T, k, 0, classes) fi += select(label == k, V{}, sqrt_p[k] * sqrt_p[k]);
    const V inv_y = over_weight(V{} + 1.0, of_class<NS>(sqrt_p, label));
    fi = T::sum(fi) * inv_y * inv_y;
  } else if (kind == Objective::kGradient) {
    FASTFI_EACH(T, k, 0, classes) {
      const V term = over_weight(grad[k], sqrt_p[k]);
      fi += term * term;
    }
    fi = T::sum(fi);
  }
  return fi;
}

// Doubles of scratch, in units of V, for d coordinates.
FASTFI_HD int64_t exact_coordinates_scratch(int64_t d, int64_t n, int64_t r) {
  return d * n + d * d + 5 * d + weighted_pivots_scratch(d, r);
}

// The coordinates of the rows in an orthonormal basis, as pivoted_cholesky() leaves them.
template <class V>
struct Coordinates {
  V* factor;    // [d, n], overwritten
  V dimension;  // of the rows' span
  V largest;    // squared length of a row
  V smallest;   // squared length of what the last pivot added
};

// FI and rank of contrasts that do not span K - 1 dimensions. sqrt_p [classes], weight2 [r]:
// base-2 logarithms of P. d: the largest dimension of any lane, and the number of factor's rows.
template <class V, class T = Alone>
FASTFI_HD void solve_coordinates(const Coordinates<V>& c, const V* sqrt_p, const V* weight2,
                                 Index<V> label, const V* grad, Objective kind, int64_t n,
                                 int64_t r, int64_t d, double row_tolerance, V* scratch, V* fi_out,
                                 V* rank_out) {
  V* inv_pivot = scratch;
  V* mean = inv_pivot + d;
  V* target = mean + d;
  V* inv_sqrt_pivot = target + d;
  Index<V>* pivot = reinterpret_cast<Index<V>*>(inv_sqrt_pivot + d);
  V* factor = reinterpret_cast<V*>(pivot + d);
  V* metric = factor + d * n;
  V* work = metric + d * d;

  // What a dependent row keeps in its coordinates: the rows' own rounding, or the Gram matrix's,
  // magnified by the smallest pivot.
  const double noise = 64.0 * 2.220446049250313e-16 * static_cast<double>(r + 1);
  const V own = c.largest * row_tolerance;
  const V carried =
      c.largest * (noise * noise) * (c.largest / select(c.smallest > 0.0, c.smallest, V{} + 1.0));
  const V cut = select(carried > own, carried, own);
  const V rank =
      weighted_pivots<V, T>(c.factor, weight2, d, n, r, cut, cut, factor, inv_pivot, pivot, work);
  *rank_out = rank;
  int64_t steps = d;
  while (steps > 0 && !any(rank > static_cast<double>(steps - 1))) --steps;
  FASTFI_EACH(T, i, 0, steps)
  inv_sqrt_pivot[i] = over_weight(select(rank > static_cast<double>(i), V{} + 1.0, V{}),
                                  gather(sqrt_p, pivot[i] + 1));

  // factor becomes X^T, then Z^T, by back substitution with its own pivot columns.
  for (int64_t i = steps - 1; i >= 0; --i) {
    V* xi = factor + i * n;
    FASTFI_EACH(T, j, i + 1, steps) work[j] = gather(xi, pivot[j]);
    T::sync();
    for (int64_t j = i + 1; j < steps; ++j) {
      const V* xj = factor + j * n;
      const V t = work[j];
      FASTFI_EACH(T, k, 0, n) xi[k] -= t * xj[k];
    }
    FASTFI_EACH(T, k, 0, n) xi[k] *= inv_pivot[i];
    T::sync();
  }
  for (int64_t i = 0; i < steps; ++i) {
    V* xi = factor + i * n;
    V along = V{};
    if (kind == Objective::kCrossEntropy) {
      const Mask<V> other = label > 0;
      along = select(other, gather(xi, select(other, label - 1, Index<V>{})), V{});
    } else if (kind == Objective::kGradient) {
      along = team_dot<T>(grad + 1, xi, r);
    } else {
      along = xi[r];
    }
    T::sync();
    const V scale = inv_sqrt_pivot[i];
    FASTFI_EACH(T, k, 0, r) xi[k] *= sqrt_p[k + 1] * scale;
    const V centre = team_dot<T>(xi, sqrt_p + 1, r);
    if (T::leads()) {
      mean[i] = centre;
      target[i] = along * scale;
      if (kind == Objective::kCrossEntropy) target[i] -= centre;
    }
  }
  T::sync();
  for (int64_t i = 0; i < steps; ++i) {
    const Mask<V> unused = rank <= static_cast<double>(i);
    FASTFI_EACH(T, j, 0, i + 1) {
      const V product = dot(factor + i * n, factor + j * n, r);
      metric[i * d + j] = j < i ? product : select(unused, V{} + 1.0, product);
    }
  }
  T::sync();
  cholesky<V, T>(metric, steps, d);
  forward_substitute<V, T>(metric, steps, d, mean);
  forward_substitute<V, T>(metric, steps, d, target);
  const V dv = team_dot<T>(target, mean, steps);
  *fi_out = team_dot<T>(target, target, steps) + dv * dv / (1.0 - team_dot<T>(mean, mean, steps));
}

FASTFI_HD int64_t exact_scratch(int64_t n, int64_t classes) {
  const int64_t r = classes - 1;
  return r * n + 2 * r + classes + exact_coordinates_scratch(r, n, r);
}

// gram [n, n]; log_prob [r + 1]; label (a position among the classes) or grad [r + 1], by kind; n
// is r, or r + 1 where the last row is h. tolerance: relative residual (a square) of the Gram
// matrix under which a row counts as dependent; row_tolerance: the square of the rows' own relative
// error. NS > 0 fixes r at compile time, and n = r.
template <class V, int NS, class T = Alone>
FASTFI_HD void solve_exact(const V* gram, const V* log_prob, Index<V> label, const V* grad,
                           Objective kind, int64_t n_, int64_t r_, double tolerance,
                           double row_tolerance, V* scratch, V* fi_out, V* rank_out) {
  const int64_t r = NS > 0 ? NS : r_;
  const int64_t n = NS > 0 ? NS : n_;
  const int64_t classes = r + 1;
  V* sqrt_p = scratch;
  V* weight2 = sqrt_p + classes;
  V* residual = weight2 + r;
  Coordinates<V> c;
  c.factor = residual + r;
  V* rest = c.factor + r * n;

  class_weights<V, T>(log_prob, classes, sqrt_p);
  V present = V{};
  c.dimension = pivoted_cholesky<V, NS, T>(gram, n, r, tolerance, c.factor, residual, &c.largest,
                                           &c.smallest);
  FASTFI_EACH(T, k, 0, r) present += select(log_prob[k + 1] > -1e300, V{} + 1.0, V{});
  present = T::sum(present);
  const Mask<V> full = c.dimension >= present;
  const V closed = full_rank_influence<V, 0, T>(sqrt_p, classes, label, grad, kind);
  *fi_out = closed;
  *rank_out = c.dimension;
  const bool closes = kind != Objective::kRow;
  if (closes && !any(c.dimension < present)) return;

  int64_t d = r;  // dimensions of the lane that has most
  while (d > 0 && !any(c.dimension > static_cast<double>(d - 1))) --d;
  FASTFI_EACH(T, k, 0, r) weight2[k] = log_prob[k + 1] * 1.4426950408889634;
  V fi, rank;
  solve_coordinates<V, T>(c, sqrt_p, weight2, label, grad, kind, n, r, d, row_tolerance, rest, &fi,
                          &rank);
  *fi_out = closes ? select(full, closed, fi) : fi;
  *rank_out = select(full, c.dimension, rank);
}

FASTFI_END
