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

// Doubles of scratch, in units of V.
FASTFI_HD int64_t exact_scratch(int64_t n, int64_t classes) {
  const int64_t r = classes - 1;
  return 2 * r * n + r * r + 6 * r + 2 * classes + weighted_pivots_scratch(r);
}

// FI at full rank, where G's range holds every contrast: sum_k g_k^2 / P_k, for objectives in terms
// of the classes. sqrt_p [classes].
template <class V>
FASTFI_HD V full_rank_influence(const V* sqrt_p, int64_t classes, Index<V> label, const V* grad,
                                Objective kind) {
  V fi = V{};
  if (kind == Objective::kCrossEntropy) {
    for (int64_t k = 0; k < classes; ++k) fi += select(label == k, V{}, sqrt_p[k] * sqrt_p[k]);
    const V inv_y = over_weight(V{} + 1.0, gather(sqrt_p, label));
    fi = fi * inv_y * inv_y;
  } else if (kind == Objective::kGradient) {
    for (int64_t k = 0; k < classes; ++k) {
      const V term = over_weight(grad[k], sqrt_p[k]);
      fi += term * term;
    }
  }
  return fi;
}

// gram [n, n]; log_prob [r + 1]; label (a position among the classes) or grad [r + 1], by kind; n
// is r, or r + 1 where the last row is h. tolerance: relative residual (a square) of the Gram
// matrix under which a row counts as dependent; row_tolerance: the square of the rows' own relative
// error. NS > 0 fixes r at compile time, and n = r.
template <class V, int NS>
FASTFI_HD void solve_exact(const V* gram, const V* log_prob, Index<V> label, const V* grad,
                           Objective kind, int64_t n_, int64_t r_, double tolerance,
                           double row_tolerance, V* scratch, V* fi_out, V* rank_out) {
  const int64_t r = NS > 0 ? NS : r_;
  const int64_t n = NS > 0 ? NS : n_;
  const int64_t classes = r + 1;
  V* sqrt_p = scratch;
  V* weight2 = sqrt_p + classes;
  V* residual = weight2 + classes;
  V* inv_pivot = residual + r;
  V* mean = inv_pivot + r;
  V* target = mean + r;
  V* inv_sqrt_pivot = target + r;
  Index<V>* pivot = reinterpret_cast<Index<V>*>(inv_sqrt_pivot + r);
  V* coordinates = reinterpret_cast<V*>(pivot + r);
  V* factor = coordinates + r * n;
  V* metric = factor + r * n;
  V* work = metric + r * r;

  class_weights(log_prob, classes, sqrt_p);
  V largest, smallest, present = V{};
  const V dimension =
      pivoted_cholesky<V, NS>(gram, n, r, tolerance, coordinates, residual, &largest, &smallest);
  for (int64_t k = 0; k < r; ++k) present += select(log_prob[k + 1] > -1e300, V{} + 1.0, V{});

  const Mask<V> full = dimension >= present;
  const V closed = full_rank_influence(sqrt_p, classes, label, grad, kind);
  *fi_out = closed;
  *rank_out = dimension;
  const bool closes = kind != Objective::kRow;
  if (closes && !any(dimension < present)) return;

  int64_t d = r;  // dimensions of the lane that has most
  while (d > 0 && !any(dimension > static_cast<double>(d - 1))) --d;
  for (int64_t k = 0; k < r; ++k) weight2[k] = log_prob[k + 1] * 1.4426950408889634;
  // What a dependent row keeps in its coordinates: the rows' own rounding, or the Gram matrix's,
  // magnified by the smallest pivot.
  const double noise = 64.0 * 2.220446049250313e-16 * static_cast<double>(classes);
  const V own = largest * row_tolerance;
  const V carried =
      largest * (noise * noise) * (largest / select(smallest > 0.0, smallest, V{} + 1.0));
  const V cut = select(carried > own, carried, own);
  const V rank =
      weighted_pivots(coordinates, weight2, d, n, r, cut, factor, inv_pivot, pivot, work);
  *rank_out = select(full, dimension, rank);
  int64_t steps = d;
  while (steps > 0 && !any(rank > static_cast<double>(steps - 1))) --steps;
  for (int64_t i = 0; i < steps; ++i)
    inv_sqrt_pivot[i] = over_weight(select(rank > static_cast<double>(i), V{} + 1.0, V{}),
                                    gather(sqrt_p, pivot[i] + 1));

  // factor becomes X^T, then Z^T, by back substitution with its own pivot columns.
  for (int64_t i = steps - 1; i >= 0; --i) {
    V* xi = factor + i * n;
    for (int64_t j = i + 1; j < steps; ++j) work[j] = gather(xi, pivot[j]);
    for (int64_t j = i + 1; j < steps; ++j) {
      const V* xj = factor + j * n;
      const V t = work[j];
      for (int64_t k = 0; k < n; ++k) xi[k] -= t * xj[k];
    }
    for (int64_t k = 0; k < n; ++k) xi[k] *= inv_pivot[i];
  }
  for (int64_t i = 0; i < steps; ++i) {
    V* xi = factor + i * n;
    V along = V{};
    if (kind == Objective::kCrossEntropy) {
      const Mask<V> other = label > 0;
      along = select(other, gather(xi, select(other, label - 1, Index<V>{})), V{});
    } else if (kind == Objective::kGradient) {
      along = dot(grad + 1, xi, r);
    } else {
      along = xi[r];
    }
    const V scale = inv_sqrt_pivot[i];
    for (int64_t k = 0; k < r; ++k) xi[k] *= sqrt_p[k + 1] * scale;
    mean[i] = dot(xi, sqrt_p + 1, r);
    target[i] = along * scale;
    if (kind == Objective::kCrossEntropy) target[i] -= mean[i];
  }
  for (int64_t i = 0; i < steps; ++i) {
    for (int64_t j = 0; j <= i; ++j) metric[i * r + j] = dot(factor + i * n, factor + j * n, r);
    const Mask<V> unused = rank <= static_cast<double>(i);
    metric[i * r + i] = select(unused, V{} + 1.0, metric[i * r + i]);
  }
  cholesky(metric, steps, r);
  forward_substitute(metric, steps, r, mean);
  forward_substitute(metric, steps, r, target);
  const V dv = dot(target, mean, steps);
  const V fi = dot(target, target, steps) + dv * dv / (1.0 - dot(mean, mean, steps));
  *fi_out = closes ? select(full, closed, fi) : fi;
}

FASTFI_END
