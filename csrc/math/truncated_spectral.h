// The truncated rule from a Gram matrix of contrasts: by the eigenvalues of the small matrix M of
// window_metric.h, and where its rounding could exceed the accuracy contract, by rotations.
#pragma once

#include "spectral.h"
#include "truncated.h"

FASTFI_BEGIN

FASTFI_HD int64_t truncated_scratch(int64_t n, int64_t classes) {
  const int64_t r = classes - 1;
  const int64_t spectral = 2 * classes + 4 * r + 2 * packed_size(r + 2) + spectral_scratch(r);
  const int64_t rotations = rotations_scratch(n, classes);
  return spectral > rotations ? spectral : rotations;
}

// By the eigenvalues of M. Arguments as in solve_truncated. Returns the lanes whose rounding errors
// may exceed the accuracy contract.
template <class V, int NS>
FASTFI_HD Mask<V> solve_by_eigenvalues(const V* gram, const V* log_prob, Index<V> label,
                                       const V* grad, Objective kind, int64_t n_, int64_t r_,
                                       double eps, V* scratch, V* fi_out, V* rank_out) {
  const int64_t r = NS > 0 ? NS : r_;
  const int64_t n = NS > 0 ? NS : n_;
  V* sqrt_p = scratch;
  V* normal = sqrt_p + r + 1;
  V* scale = normal + r + 1;
  V* centre = scale + r;
  V* mean = centre + r;  // N P
  V* cross = mean + r;   // the rows' products with h
  V* m = cross + r;
  V* work = m + 2 * packed_size(r + 2);

  class_weights(log_prob, r + 1, sqrt_p);
  V length = V{};
  FASTFI_UNROLL
  for (int64_t k = 0; k <= r; ++k) {
    normal[k] = select(sqrt_p[k] > 0.0, sqrt_p[k] + eps, V{});
    length += normal[k] * normal[k];
  }
  length = sqrt_of(length);
  const V first = sqrt_p[0] * sqrt_p[0] / normal[0] / (length + normal[0]);
  FASTFI_UNROLL
  for (int64_t k = 0; k < r; ++k) {
    const V p = sqrt_p[k + 1];
    scale[k] = p * p / (p + eps);
    centre[k] = scale[k] - normal[k + 1] * first;
  }
  FASTFI_UNROLL
  for (int64_t i = 0; i < r; ++i) {
    V sum = V{};
    FASTFI_UNROLL
    for (int64_t k = 0; k < r; ++k) sum += gram[i * n + k] * sqrt_p[k + 1] * sqrt_p[k + 1];
    mean[i] = sum;
  }
  const V p_y = kind == Objective::kCrossEntropy ? of_class<NS>(sqrt_p, label) : V{};
  const V factor = p_y * p_y / (p_y * p_y + eps);
  const Mask<V> other = label > 0;
  const Index<V> row = select(other, label - 1, Index<V>{});
  V of_mean = V{}, of_cross = V{};
  FASTFI_UNROLL
  for (int64_t i = 0; i < r; ++i) {
    if (kind == Objective::kCrossEntropy)
      cross[i] = factor * (mean[i] - select(other, gather(gram, row * n + i), V{}));
    else if (kind == Objective::kGradient)
      cross[i] = dot(gram + i * n, grad + 1, r);
    else
      cross[i] = gram[r * n + i];
    const V p = sqrt_p[i + 1] * sqrt_p[i + 1];
    of_mean += p * mean[i];
    of_cross += p * cross[i];
  }
  FASTFI_UNROLL
  for (int64_t i = 0; i < r; ++i) {
    const V along = centre[i] * of_mean - scale[i] * mean[i];
    const V own = centre[i];
    V* to = m + packed(i, 0);
    FASTFI_UNROLL
    for (int64_t j = 0; j <= i; ++j)
      to[j] = scale[i] * gram[i * n + j] * scale[j] - own * scale[j] * mean[j] + along * centre[j];
    m[packed(r, i)] = scale[i] * cross[i] - own * of_cross;
  }
  m[packed(r, r)] = V{};
  return truncated_window<V, NS>(m, r, eps, 2, V{} - 1.0, work, fi_out, rank_out);
}

// Arguments as in solve_exact; eps > 0. rank_out counts the singular values above eps.
template <class V, int NS>
FASTFI_HD void solve_truncated(const V* gram, const V* log_prob, Index<V> label, const V* grad,
                               Objective kind, int64_t n, int64_t r, double tolerance, double eps,
                               V* scratch, V* fi_out, V* rank_out) {
  const Mask<V> left = solve_by_eigenvalues<V, NS>(gram, log_prob, label, grad, kind, n, r, eps,
                                                   scratch, fi_out, rank_out);
  if (!any(left)) return;
  V fi, rank;
  solve_by_rotations<V, NS>(gram, log_prob, label, grad, kind, n, r, tolerance, eps, scratch, &fi,
                            &rank);
  *fi_out = select(left, fi, *fi_out);
  *rank_out = select(left, rank, *rank_out);
}

FASTFI_END
