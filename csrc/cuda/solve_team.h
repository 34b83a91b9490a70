// Solves by teams of lanes, with their scratch in shared memory or, for many classes, in the
// device's.
#pragma once

#include "../math/damped.h"
#include "../math/exact.h"
#include "../math/truncated.h"
#include "../problems.h"
#include "lanes_team.h"

FASTFI_BEGIN

// Up to this many rows, a team of 16 lanes works in shared memory; beyond it, a whole warp.
constexpr int64_t kLargestShared = 16;
constexpr int kTeamThreads = 128;

// Doubles that one problem needs.
inline __host__ __device__ int64_t team_scratch(Rule rule, int64_t n, int64_t classes) {
  return rule == Rule::kExact       ? exact_scratch(n, classes)
         : rule == Rule::kTruncated ? rotations_scratch(n, classes)
                                    : damped_scratch(classes);
}

// One problem, by every member of the team: gram [n, n], one sample's log_prob, label or grad, tau.
template <Rule R, class T>
__device__ void solve_by_team(const SolveProblem& p, const double* gram, int64_t sample,
                              double* scratch, double* fi_out, int64_t* rank_out) {
  const Objective kind = static_cast<Objective>(p.objective);
  const double* log_prob = p.log_prob + sample * p.classes;
  const double* grad = p.grad ? p.grad + sample * p.classes : nullptr;
  const int64_t label = p.label ? p.label[sample] : 0, r = p.classes - 1;
  double fi = nan(""), rank = 0.0;
  if (label >= 0 && label < p.classes) {
    if constexpr (R == Rule::kExact)
      solve_exact<double, 0, T>(gram, log_prob, label, grad, kind, p.n, r, p.tolerance,
                                p.row_tolerance, scratch, &fi, &rank);
    else if constexpr (R == Rule::kTruncated)
      solve_by_rotations<double, 0, T>(gram, log_prob, label, grad, kind, p.n, r, p.tolerance,
                                       p.eps, scratch, &fi, &rank);
    else
      solve_damped<double, 0, T>(gram, log_prob, label, grad, kind, p.n, r, p.tau[sample], scratch,
                                 &fi);
  }
  if (T::leads()) {
    *fi_out = fi;
    if (rank_out) *rank_out = static_cast<int64_t>(rank);
  }
  T::sync();  // before the scratch is used for another problem
}

// What one launch leaves to the next: list [0] is how many, then come their places.
__device__ inline void leave(int64_t* list, int64_t place) {
  const auto at = atomicAdd(reinterpret_cast<unsigned long long*>(list), 1ull);
  list[1 + at] = place;
}

// A team's own scratch. Which memory it is in is known at compile time: generic accesses are
// slower.
template <int L>
__device__ double* team_memory(double* workspace, int64_t each) {
  const int64_t in_block = threadIdx.x / L;
  if constexpr (L == 16) {
    FASTFI_SHARED(shared);
    return shared + in_block * each;
  } else {
    return workspace + (int64_t{blockIdx.x} * (kTeamThreads / L) + in_block) * each;
  }
}

struct TeamSolve {
  SolveProblem problem;
  const int64_t* list;  // null: all problems
  double* workspace;    // of teams of 32; those of 16 work in shared memory
  int64_t scratch;      // doubles for each team
};

template <Rule R, int L>
__global__ void __launch_bounds__(kTeamThreads) solve_team_kernel(TeamSolve s) {
  using T = Lanes<L>;
  const SolveProblem& p = s.problem;
  const int64_t in_block = threadIdx.x / L, teams = int64_t{gridDim.x} * (kTeamThreads / L);
  const int64_t team = int64_t{blockIdx.x} * (kTeamThreads / L) + in_block;
  double* scratch = team_memory<L>(s.workspace, s.scratch);
  const int64_t many = s.list ? s.list[0] : p.samples * p.blocks, size = p.n * p.n;
  for (int64_t i = team; i < many; i += teams) {
    const int64_t at = s.list ? s.list[1 + i] : i;
    solve_by_team<R, T>(p, p.gram + at * size, at / p.blocks, scratch, p.fi + at,
                        p.rank ? p.rank + at : nullptr);
  }
}

FASTFI_END
