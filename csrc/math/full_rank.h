// Exact FI where the Gram matrix of the contrasts is surely of full rank, without pivots: what one
// CUDA thread does before a problem is given to a team. Nearly all problems end here.
#pragma once

#include "exact.h"
#include "window_solve.h"

FASTFI_BEGIN

// Whether the contrasts of all present classes are surely independent. a: their packed Gram matrix
// [NS, NS], overwritten; present [NS]: an absent class's row counts for nothing.
template <class V, int NS>
FASTFI_HD Mask<V> surely_independent(V* a, const Mask<V>* present, double tolerance) {
  V largest = V{};
  FASTFI_UNROLL
  for (int64_t i = 0; i < NS; ++i)
    largest = select(present[i] & (a[packed(i, i)] > largest), a[packed(i, i)], largest);
  FASTFI_UNROLL
  for (int64_t i = 0; i < NS; ++i) {
    a[packed(i, i)] = select(present[i], a[packed(i, i)], largest);
    FASTFI_UNROLL
    for (int64_t j = 0; j < i; ++j)
      a[packed(i, j)] = select(present[i] & present[j], a[packed(i, j)], V{});
  }
  return surely_above<V, NS>(a, NS, 2.0 * tolerance * largest) & (largest > 0.0);
}

// The same, and FI and rank where they are. log_prob [NS + 1], -infinity for an absent class.
template <class V, int NS>
FASTFI_HD Mask<V> solve_full_rank(V* a, const V* log_prob, Index<V> label, const V* grad,
                                  Objective kind, double tolerance, V* fi_out, V* rank_out) {
  V count = V{}, sqrt_p[NS + 1];
  Mask<V> present[NS];
  FASTFI_UNROLL
  for (int64_t i = 0; i < NS; ++i) {
    present[i] = log_prob[i + 1] > -1e300;
    count += select(present[i], V{} + 1.0, V{});
  }
  class_weights(log_prob, NS + 1, sqrt_p);
  *fi_out = full_rank_influence<V, NS>(sqrt_p, NS + 1, label, grad, kind);
  *rank_out = count;
  return surely_independent<V, NS>(a, present, tolerance);
}

FASTFI_END
