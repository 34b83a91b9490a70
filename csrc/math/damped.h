// FI_tau = h^T (G + tau I)^-1 h by one Cholesky factorisation.
//
// The covariance S = diag(P') - P' P'^T of the contrasts is W W^T with W = diag(p) (I - b p p^T),
// p = sqrt(P'), b = 1 / (1 + sqrt(P_0)). With M = W^T N W and u = W^-1 g', h = D^T g':
// FI_tau = u^T M (M + tau I)^-1 u.
#pragma once

#include "classes.h"
#include "linalg.h"

FASTFI_BEGIN

FASTFI_HD int64_t damped_scratch(int64_t classes) {
  const int64_t r = classes - 1;
  return r * r + 3 * r + classes;
}

// Arguments as in solve_exact; tau >= 0, and 0 (a metric that vanishes) gives 0.
template <class V, int NS, class T = Alone>
FASTFI_HD void solve_damped(const V* gram, const V* log_prob, Index<V> label, const V* grad,
                            Objective kind, int64_t n_, int64_t r_, V tau, V* scratch, V* fi_out) {
  const int64_t r = NS > 0 ? NS : r_;
  const int64_t n = NS > 0 ? NS : n_;
  const int64_t classes = r + 1;
  V* sqrt_p = scratch;
  V* u = sqrt_p + classes;
  V* mu = u + r;
  V* weighted = mu + r;
  V* m = weighted + r;

  class_weights<V, T>(log_prob, classes, sqrt_p);
  const V* p = sqrt_p + 1;
  const V top = sqrt_p[0];
  const V beta = 1.0 / (1.0 + top);

  // A = diag(p) N diag(p), then M = A - b (p a^T + a p^T) + b^2 (p.a) p p^T with a = A p.
  if constexpr (T::kSize > 1) {
    for (int64_t i = 0; i < r; ++i) {
      FASTFI_EACH(T, j, 0, r) m[i * r + j] = p[i] * gram[i * n + j] * p[j];
      const V sum = team_dot<T>(m + i * r, p, r);
      if (T::leads()) weighted[i] = sum;
    }
    T::sync();
  } else {
    // The lower triangle alone: a CUDA thread has no registers for both.
    FASTFI_UNROLL
    for (int64_t i = 0; i < r; ++i) {
      V sum = V{};
      FASTFI_UNROLL
      for (int64_t j = 0; j < i; ++j) {
        const V x = p[i] * gram[i * n + j] * p[j];
        m[i * r + j] = x;
        sum += x * p[j];
        weighted[j] += x * p[i];
      }
      m[i * r + i] = p[i] * gram[i * n + i] * p[i];
      weighted[i] = sum + m[i * r + i] * p[i];
    }
  }
  const V half = team_dot<T>(weighted, p, r) * beta * 0.5;
  FASTFI_EACH(T, i, 0, r) weighted[i] = beta * (weighted[i] - half * p[i]);
  T::sync();
  const Mask<V> positive = tau > 0.0;
  const V shift = select(positive, tau, V{} + 1.0);
  for (int64_t i = 0; i < r; ++i) {
    FASTFI_EACH(T, j, 0, i + 1) {
      const V less = m[i * r + j] - (p[i] * weighted[j] + weighted[i] * p[j]);
      m[i * r + j] = j < i ? less : less + shift;
    }
  }
  T::sync();
  cholesky<V, T>(m, r, r);

  if (kind == Objective::kRow) {
    FASTFI_EACH(T, k, 0, r) mu[k] = p[k] * gram[k * n + r];
  } else {
    V* g = weighted;  // N (W u) = N g', before it is overwritten
    if (kind == Objective::kCrossEntropy) {
      const Mask<V> is_top = label == 0;
      const V inv_top = 1.0 / top;
      const V inv_label = over_weight(V{} + 1.0, of_class<NS>(sqrt_p, label));
      FASTFI_EACH(T, k, 0, r) {
        const V hit = select(label == k + 1, V{} + 1.0, V{});
        g[k] = p[k] * p[k] - hit;
        u[k] = select(is_top, p[k] * inv_top, beta * p[k] - hit * inv_label);
      }
    } else {
      V sum = V{};
      FASTFI_EACH(T, k, 0, r) {
        g[k] = grad[k + 1];
        sum += g[k];
      }
      const V along = T::sum(sum) * beta / top;
      FASTFI_EACH(T, k, 0, r) u[k] = over_weight(g[k], p[k]) + along * p[k];
    }
    T::sync();
    FASTFI_EACH(T, k, 0, r) mu[k] = p[k] * dot(gram + k * n, g, r);
  }
  const V along = beta * team_dot<T>(mu, p, r);
  FASTFI_EACH(T, k, 0, r) mu[k] -= along * p[k];
  T::sync();
  forward_substitute<V, T>(m, r, r, mu);
  V fi;
  if (kind == Objective::kRow) {
    fi = (gram[r * n + r] - team_dot<T>(mu, mu, r)) / shift;
  } else {
    forward_substitute<V, T>(m, r, r, u);
    fi = team_dot<T>(u, mu, r);
  }
  *fi_out = select(positive & (fi > 0.0), fi, V{});
}

FASTFI_END
