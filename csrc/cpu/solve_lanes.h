// Solves of many small problems, one in each lane, and of large problems one at a time.
#pragma once

#include "../math/damped.h"
#include "../math/exact.h"
#include "../math/lanes.h"
#include "../math/truncated_spectral.h"
#include "kernels.h"

FASTFI_BEGIN

// Up to this many rows, kLanes problems fit the second-level cache together; beyond it the inner
// loops of one problem are long enough to fill the vector units by themselves.
constexpr int64_t kLargestInLanes = 32;
constexpr int kLargestCompiled = 15;  // contrasts, so up to 16 classes

inline bool in_lanes(const SolveProblem& p) { return p.n <= kLargestInLanes; }

inline int64_t solve_units(const SolveProblem& p) {
  const int64_t problems = p.samples * p.blocks;
  return in_lanes(p) ? (problems + kLanes - 1) / kLanes : problems;
}

inline int64_t solve_scratch(const SolveProblem& p) {
  const int64_t work = p.rule == Rule::kExact       ? exact_scratch(p.n, p.classes)
                       : p.rule == Rule::kTruncated ? truncated_scratch(p.n, p.classes)
                                                    : damped_scratch(p.classes);
  const int64_t inputs = p.n * p.n + 2 * p.classes;
  return (work + inputs) * (in_lanes(p) ? kLanes : 1);
}

template <class V, int NS>
void solve_one(const SolveProblem& p, const V* gram, const V* log_prob, Index<V> label,
               const V* grad, V tau, V* scratch, V* fi, V* rank) {
  const Objective kind = static_cast<Objective>(p.objective);
  const int64_t r = p.classes - 1;
  if (p.rule == Rule::kExact)
    solve_exact<V, NS>(gram, log_prob, label, grad, kind, p.n, r, p.tolerance, p.row_tolerance,
                       scratch, fi, rank);
  else if (p.rule == Rule::kTruncated)
    solve_truncated<V, NS>(gram, log_prob, label, grad, kind, p.n, r, p.tolerance, p.eps, scratch,
                           fi, rank);
  else
    solve_damped<V, NS>(gram, log_prob, label, grad, kind, p.n, r, tau, scratch, fi);
}

// Units are groups of kLanes problems. The last group repeats its last problem in the idle lanes.
template <int NS>
void solve_groups(const SolveProblem& p, int64_t begin, int64_t end, double* memory) {
  const int64_t problems = p.samples * p.blocks;
  const int64_t n = NS > 0 ? NS : p.n, size = n * n, k = p.classes;
  VecD* gram = reinterpret_cast<VecD*>(memory);
  VecD* log_prob = gram + size;
  VecD* grad = log_prob + k;
  VecD* scratch = grad + k;
  for (int64_t unit = begin; unit < end; ++unit) {
    VecI label = VecI{};
    VecD tau = VecD{}, fi = VecD{}, rank = VecD{};
    for (int l = 0; l < kLanes; ++l) {
      const int64_t wanted = unit * kLanes + l;
      const int64_t at = wanted < problems ? wanted : problems - 1;
      const int64_t sample = at / p.blocks;
      // The lower triangle; the upper one is copied below, kLanes problems at a time.
      double* g = reinterpret_cast<double*>(gram) + l;
      const double* from = p.gram + at * size;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j <= i; ++j) g[(i * n + j) * kLanes] = from[i * n + j];
      double* lp = reinterpret_cast<double*>(log_prob) + l;
      for (int64_t i = 0; i < k; ++i) lp[i * kLanes] = p.log_prob[sample * k + i];
      if (p.grad) {
        double* to = reinterpret_cast<double*>(grad) + l;
        for (int64_t i = 0; i < k; ++i) to[i * kLanes] = p.grad[sample * k + i];
      }
      if (p.label) label[l] = p.label[sample];
      if (p.tau) tau[l] = p.tau[sample];
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < i; ++j) gram[j * n + i] = gram[i * n + j];
    solve_one<VecD, NS>(p, gram, log_prob, label, grad, tau, scratch, &fi, &rank);
    for (int l = 0; l < kLanes && unit * kLanes + l < problems; ++l) {
      p.fi[unit * kLanes + l] = fi[l];
      if (p.rank) p.rank[unit * kLanes + l] = static_cast<int64_t>(rank[l]);
    }
  }
}

inline void solve_large(const SolveProblem& p, int64_t begin, int64_t end, double* memory) {
  for (int64_t at = begin; at < end; ++at) {
    const int64_t sample = at / p.blocks;
    double rank = 0.0;
    solve_one<double, 0>(p, p.gram + at * p.n * p.n, p.log_prob + sample * p.classes,
                         p.label ? p.label[sample] : 0,
                         p.grad ? p.grad + sample * p.classes : nullptr,
                         p.tau ? p.tau[sample] : 0.0, memory, p.fi + at, &rank);
    if (p.rank) p.rank[at] = static_cast<int64_t>(rank);
  }
}

typedef void (*SolveFunction)(const SolveProblem&, int64_t, int64_t, double*);

template <int NS>
SolveFunction compiled_for(int64_t r) {
  if (r == NS) return solve_groups<NS>;
  if constexpr (NS > 1)
    return compiled_for<NS - 1>(r);
  else
    return solve_groups<0>;
}

inline void solve(const SolveProblem& p, int64_t begin, int64_t end, double* scratch) {
  const bool square = p.n == p.classes - 1;  // no row for h
  const SolveFunction run = !in_lanes(p) ? solve_large
                            : square     ? compiled_for<kLargestCompiled>(p.n)
                                         : solve_groups<0>;
  run(p, begin, end, scratch);
}

FASTFI_END
