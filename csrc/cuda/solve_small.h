// Solves of few classes: one problem for each thread, its arrays in registers. What a thread cannot
// finish with certainty (contrasts that may be dependent, eigenvalues too near the cut) is left to
// a second launch, of teams.
#pragma once

#include "../math/full_rank.h"
#include "../math/truncated_spectral.h"
#include "solve_team.h"

FASTFI_BEGIN

constexpr int kSmallThreads = 128;

struct SmallSolve {
  SolveProblem problem;
  int64_t* list;  // takes what is left; null for kDamped, which leaves nothing
};

// Gram matrices are staged with an odd stride: neighbouring threads read from different banks.
template <int NS>
constexpr int kStagedStride = (NS * NS) | 1;

// count matrices [n, n] from global memory, in reading order; entries beyond n are zero.
template <int NS>
__device__ void stage(const double* from, int count, int n, double* to) {
  const int size = n * n;
  if (n < NS)
    for (int i = threadIdx.x; i < count * kStagedStride<NS>; i += kSmallThreads) to[i] = 0.0;
  __syncthreads();
  int row = threadIdx.x / size, at = threadIdx.x % size;
  for (int i = threadIdx.x; i < count * size; i += kSmallThreads) {
    to[row * kStagedStride<NS> + (n == NS ? at : at / n * NS + at % n)] = from[i];
    at += kSmallThreads % size;
    row += kSmallThreads / size;
    if (at >= size) {
      at -= size;
      ++row;
    }
  }
  __syncthreads();
}

// One problem by one thread; whether it is finished.
template <Rule R, int NS>
__device__ bool solve_by_thread(const SolveProblem& p, const double* gram, int64_t sample,
                                double* fi, double* rank) {
  const Objective kind = static_cast<Objective>(p.objective);
  const int64_t k = p.classes, given = p.label ? p.label[sample] : 0;
  const bool valid = given >= 0 && given < k;
  const int64_t label = valid ? given : 0;
  double log_prob[NS + 1], grad[NS + 1];
  FASTFI_UNROLL
  for (int i = 0; i <= NS; ++i) {
    log_prob[i] = i < k ? p.log_prob[sample * k + i] : -1e308;  // absent, as -infinity is
    grad[i] = i < k && p.grad ? p.grad[sample * k + i] : 0.0;
  }
  bool done = true;
  if constexpr (R == Rule::kExact) {
    double a[NS * (NS + 1) / 2];
    FASTFI_UNROLL
    for (int i = 0; i < NS; ++i) {
      FASTFI_UNROLL
      for (int j = 0; j <= i; ++j) a[packed(i, j)] = gram[i * NS + j];
    }
    done = solve_full_rank<double, NS>(a, log_prob, label, grad, kind, p.tolerance, fi, rank);
  } else if constexpr (R == Rule::kTruncated) {
    double scratch[2 * (NS + 1) + 9 * NS + (NS + 2) * (NS + 3)];
    done = !solve_by_eigenvalues<double, NS>(gram, log_prob, label, grad, kind, NS, NS, p.eps,
                                             scratch, fi, rank);
  } else {
    double scratch[NS * NS + 4 * NS + 1];
    solve_damped<double, NS>(gram, log_prob, label, grad, kind, NS, NS, p.tau[sample], scratch, fi);
  }
  if (!valid) {
    *fi = nan("");
    *rank = 0.0;
  }
  return done || !valid;
}

template <Rule R, int NS>
__global__ void __launch_bounds__(kSmallThreads) solve_small_kernel(SmallSolve s) {
  FASTFI_SHARED(shared);
  const SolveProblem& p = s.problem;
  const int64_t problems = p.samples * p.blocks, first = int64_t{blockIdx.x} * kSmallThreads;
  const int count = static_cast<int>(gpu::least(kSmallThreads, problems - first));
  stage<NS>(p.gram + first * p.n * p.n, count, static_cast<int>(p.n), shared);
  const int mine = threadIdx.x;
  if (mine >= count) return;
  const int64_t at = first + mine, sample = p.blocks == 1 ? at : at / p.blocks;
  double fi = 0.0, rank = 0.0;
  if (solve_by_thread<R, NS>(p, shared + mine * kStagedStride<NS>, sample, &fi, &rank)) {
    p.fi[at] = fi;
    if (p.rank) p.rank[at] = static_cast<int64_t>(rank);
  } else {
    leave(s.list, at);
  }
}

FASTFI_END
