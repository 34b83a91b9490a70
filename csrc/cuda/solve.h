// Which solve kernel a problem is given to. Included by one source for each rule.
#pragma once

#include "compiled_sizes.h"
#include "launch.h"
#include "solve_small.h"

FASTFI_BEGIN

// Blocks of teams for so many problems of n rows, `each` doubles of scratch for one.
inline int64_t team_blocks(int64_t problems, int64_t n, int64_t each) {
  const int64_t in_block = kTeamThreads / (n <= kLargestShared ? 16 : 32);
  int64_t most = gpu::most_blocks(8192);
  if (n > kLargestShared) {
    constexpr int64_t kWorkspaceDoubles = int64_t{64} << 20;  // 512 MiB
    most = gpu::most(1, gpu::least(gpu::most_blocks(1056), kWorkspaceDoubles / (in_block * each)));
  }
  return gpu::least((problems + in_block - 1) / in_block, most);
}

inline int64_t solve_team_blocks(const SolveProblem& p) {
  return team_blocks(p.samples * p.blocks, p.n, team_scratch(p.rule, p.n, p.classes));
}

// Doubles of workspace: a list of problems, or the scratch of teams that is too large to be shared.
inline int64_t solve_doubles(const SolveProblem& p) {
  if (for_threads(p.objective, p.classes))
    return p.rule == Rule::kDamped ? 0 : 1 + p.samples * p.blocks;
  if (p.n <= kLargestShared) return 0;
  return solve_team_blocks(p) * (kTeamThreads / 32) * team_scratch(p.rule, p.n, p.classes);
}

template <Rule R>
cudaError_t launch_teams(const SolveProblem& p, const int64_t* list, double* workspace,
                         cudaStream_t stream) {
  const int64_t scratch = team_scratch(R, p.n, p.classes);
  if (p.n <= kLargestShared)
    return gpu::launch(solve_team_kernel<R, 16>, solve_team_blocks(p), kTeamThreads,
                       8 * scratch * (kTeamThreads / 16), stream,
                       TeamSolve{p, list, nullptr, scratch});
  return gpu::launch(solve_team_kernel<R, 32>, solve_team_blocks(p), kTeamThreads, 0, stream,
                     TeamSolve{p, list, workspace, scratch});
}

template <Rule R, int NS>
cudaError_t launch_small(const SolveProblem& p, double* workspace, cudaStream_t stream) {
  int64_t* list = R == Rule::kDamped ? nullptr : reinterpret_cast<int64_t*>(workspace);
  if (list) {
    const cudaError_t error = cudaMemsetAsync(list, 0, sizeof(int64_t), stream);
    if (error != cudaSuccess) return error;
  }
  const int64_t blocks = (p.samples * p.blocks + kSmallThreads - 1) / kSmallThreads;
  const cudaError_t error =
      gpu::launch(solve_small_kernel<R, NS>, blocks, kSmallThreads,
                  int64_t{8} * kSmallThreads * kStagedStride<NS>, stream, SmallSolve{p, list});
  if (error != cudaSuccess || !list) return error;
  return launch_teams<R>(p, list, nullptr, stream);
}

template <Rule R>
cudaError_t launch_solve(const SolveProblem& p, double* workspace, cudaStream_t stream) {
  if (!for_threads(p.objective, p.classes)) return launch_teams<R>(p, nullptr, workspace, stream);
  return with_contrasts(p.classes - 1, [&](auto size) {
    return launch_small<R, decltype(size)::value>(p, workspace, stream);
  });
}

FASTFI_END

namespace fastfi {
namespace gpu {

cudaError_t solve_exact(const SolveProblem& p, double* workspace, cudaStream_t stream);
cudaError_t solve_truncated(const SolveProblem& p, double* workspace, cudaStream_t stream);
cudaError_t solve_damped(const SolveProblem& p, double* workspace, cudaStream_t stream);

}  // namespace gpu
}  // namespace fastfi
