// The rule of Shu and Zhu's published scripts: L0_k = dP_k / (sqrt(P_k) + eps), singular values of
// L0 above eps kept, FI = sum (u_i . h)^2 / s_i^2, and for cross-entropy h = -dP_y / (P_y + eps).
//
// A pivoted Cholesky factor gives the contrasts in an orthonormal basis of their span. The rows of
// A = (weighted, centred factor)^T [r, K] are then made orthogonal by one-sided Jacobi rotations,
// which act on h's coordinates too: at the end s_i is a row's norm and u_i . h a coordinate. No
// Gram matrix of L0 is formed, so small singular values keep their digits.
#pragma once

#include "classes.h"
#include "pivoted_cholesky.h"

FASTFI_BEGIN

FASTFI_HD int64_t truncated_factor_scratch(int64_t d, int64_t classes) {
  return d * classes + 2 * d + classes;
}
FASTFI_HD int64_t rotations_scratch(int64_t n, int64_t classes) {
  const int64_t r = classes - 1;
  return r * n + r + classes + truncated_factor_scratch(r, classes);
}

// One rotation of rows a, b (squared norms na, nb) that makes them orthogonal; ha, hb turn along.
// Returns whether any lane still had to turn.
template <class V, class T = Alone>
FASTFI_HD bool jacobi_rotate(V* a, V* b, int64_t n, double tolerance, V* na, V* nb, V* ha, V* hb) {
  const V g = team_dot<T>(a, b, n);
  const Mask<V> turn = g * g > *na * *nb * (tolerance * tolerance);
  if (!any(turn)) return false;
  // tan of the angle, the smaller root: 2 g / (d + sign(d) sqrt(d^2 + 4 g^2)).
  const V d = *nb - *na;
  const V twice = 2.0 * g;
  const V root = sqrt_of(d * d + twice * twice);
  const V t =
      select(turn, twice, V{}) / select(turn, select(d < 0.0, d - root, d + root), V{} + 1.0);
  const V c = 1.0 / sqrt_of(1.0 + t * t);
  const V s = c * t;
  FASTFI_EACH(T, k, 0, n) {
    const V x = a[k], y = b[k];
    a[k] = c * x - s * y;
    b[k] = s * x + c * y;
  }
  const V less = *na - t * g, more = *nb + t * g;
  T::sync();
  if (T::leads()) {
    const V x = *ha, y = *hb;
    *ha = c * x - s * y;
    *hb = s * x + c * y;
    *na = select(less > 0.0, less, V{});
    *nb = more;
  }
  T::sync();
  return true;
}

// FI and the number of singular values above eps from the rows' coordinates in an orthonormal
// basis: factor [most_rows, n], zero in rows from `steps` on. sqrt_p [r + 1].
template <class V, class T = Alone>
FASTFI_HD void solve_factor(const V* factor, const V* sqrt_p, Index<V> label, const V* grad,
                            Objective kind, int64_t n, int64_t r, int64_t most_rows, int64_t steps,
                            double eps, V* scratch, V* fi_out, V* rank_out) {
  const int64_t classes = r + 1;
  V* weight = scratch;
  V* h = weight + classes;
  V* norm = h + most_rows;
  V* a = norm + most_rows;
  FASTFI_EACH(T, k, 0, classes) weight[k] = sqrt_p[k] * sqrt_p[k] / (sqrt_p[k] + eps);

  const V p_y = kind == Objective::kCrossEntropy ? gather(sqrt_p, label) : V{};
  const V of_label = p_y * p_y / (p_y * p_y + eps);
  for (int64_t i = 0; i < steps; ++i) {
    const V* row = factor + i * n;
    V* ai = a + i * classes;
    V mean = V{};
    FASTFI_EACH(T, k, 0, r) mean += row[k] * sqrt_p[k + 1] * sqrt_p[k + 1];
    mean = T::sum(mean);
    if (T::leads()) ai[0] = -mean;  // row i of dl_k in the orthonormal basis
    FASTFI_EACH(T, k, 0, r) ai[k + 1] = row[k] - mean;
    T::sync();
    V along = V{};
    if (kind == Objective::kCrossEntropy)
      along = -gather(ai, label) * of_label;
    else if (kind == Objective::kGradient)
      along = team_dot<T>(grad + 1, row, r);
    else
      along = row[r];
    T::sync();
    if (T::leads()) h[i] = along;
    FASTFI_EACH(T, k, 0, classes) ai[k] *= weight[k];
  }

  // Rows converge when every cosine is at rounding level; one-sided Jacobi needs 5 to 8 sweeps.
  const double cosine = 2.220446049250313e-16 * static_cast<double>(classes);
  for (int sweep = 0; sweep < 40; ++sweep) {
    T::sync();  // all have read the last rotation's norms
    for (int64_t i = 0; i < steps; ++i) {
      const V square = team_dot<T>(a + i * classes, a + i * classes, classes);
      if (T::leads()) norm[i] = square;
    }
    T::sync();
    // Round robin: the pairs of a round share no row, so that their rotations overlap in the
    // pipeline. With an odd number of rows one of them has no partner in each round. The order is
    // that of most_rows, whatever the rank: other lanes must not change this one's.
    const int64_t players = most_rows + (most_rows & 1), rounds = players - 1;
    bool turned = false;
    for (int64_t round = 0; round < rounds; ++round)
      for (int64_t pair = 0; 2 * pair < players; ++pair) {
        // Modulo `rounds`: a GPU takes as long for two divisions as for a rotation.
        const int64_t up = round + pair, down = round - pair;
        const int64_t left = up < rounds ? up : up - rounds;
        const int64_t right = pair == 0 ? rounds : down < 0 ? down + rounds : down;
        const int64_t i = left < right ? left : right, j = left < right ? right : left;
        if (j < steps)
          turned |= jacobi_rotate<V, T>(a + i * classes, a + j * classes, classes, cosine, norm + i,
                                        norm + j, h + i, h + j);
      }
    if (!turned) break;
  }
  V fi = V{}, kept = V{};
  for (int64_t i = 0; i < steps; ++i) {
    const V square = team_dot<T>(a + i * classes, a + i * classes, classes);
    const Mask<V> keep = square > eps * eps;
    fi += select(keep, h[i] * h[i] / select(keep, square, V{} + 1.0), V{});
    kept += select(keep, V{} + 1.0, V{});
  }
  *fi_out = fi;
  *rank_out = kept;
}

// Arguments as in solve_exact; eps > 0. rank_out counts the singular values above eps.
template <class V, int NS, class T = Alone>
FASTFI_HD void solve_by_rotations(const V* gram, const V* log_prob, Index<V> label, const V* grad,
                                  Objective kind, int64_t n_, int64_t r_, double tolerance,
                                  double eps, V* scratch, V* fi_out, V* rank_out) {
  const int64_t r = NS > 0 ? NS : r_;
  const int64_t n = NS > 0 ? NS : n_;
  const int64_t classes = r + 1;
  V* sqrt_p = scratch;
  V* residual = sqrt_p + classes;
  V* factor = residual + r;
  class_weights<V, T>(log_prob, classes, sqrt_p);
  V largest, smallest;
  const V rank =
      pivoted_cholesky<V, NS, T>(gram, n, r, tolerance, factor, residual, &largest, &smallest);
  int64_t steps = r;
  while (steps > 0 && !any(rank > static_cast<double>(steps - 1))) --steps;
  solve_factor<V, T>(factor, sqrt_p, label, grad, kind, n, r, r, steps, eps, factor + r * n, fi_out,
                     rank_out);
}

FASTFI_END
