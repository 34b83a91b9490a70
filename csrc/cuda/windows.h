// Which window kernels a problem is given to. Included by one source for each rule.
#pragma once

#include "launch.h"
#include "solve.h"
#include "windows_small.h"

FASTFI_BEGIN

template <Rule R, int NS>
int64_t window_shared(const SmallWindows& s) {
  const int64_t stride = s.columns + 2 * s.reach;
  return 8 * (metric_stride(s.windows.problem.classes) + s.lines * kSums<R, NS> * stride);
}

// The tile of a block: lines as long as two blocks share a multiprocessor, columns as long as one
// fits. False where windows are too wide.
template <Rule R, int NS>
bool choose_tile(SmallWindows* s) {
  const WindowProblem& p = s->windows.problem;
  const int64_t limit = gpu::most_shared();
  s->reach = gpu::least(s->windows.radius[s->windows.count - 1], p.width - 1);
  s->columns = gpu::least(p.width, p.height > 1 ? 64 : kWindowThreads);
  s->lines = gpu::least(p.height, gpu::most(1, kWindowThreads / s->columns));
  while (s->lines > 1 && window_shared<R, NS>(*s) > limit / 2 - 1024) --s->lines;
  while (s->columns > 16 && window_shared<R, NS>(*s) > limit) s->columns /= 2;
  return window_shared<R, NS>(*s) <= limit;
}

// Windows of one sample, at the scales of one launch.
inline int64_t windows_each(const WindowProblem& p) {
  const int64_t scales = gpu::least(p.scales, kMostScales);
  return scales * (p.joint ? 1 : p.channels) * p.depth * p.height * p.width;
}

// Samples of one launch: as many as keep the list of what is left within 256 MiB.
inline int64_t samples_at_once(const WindowProblem& p) {
  constexpr int64_t kList = int64_t{32} << 20;
  return gpu::most(1, gpu::least(p.samples, kList / gpu::most(1, windows_each(p))));
}

inline int64_t window_team_doubles(const WindowProblem& p) {
  return p.n * p.n + team_scratch(p.rule, p.n, p.classes);
}

inline int64_t window_team_blocks(const WindowProblem& p) {
  return team_blocks(samples_at_once(p) * windows_each(p), p.n, window_team_doubles(p));
}

// Doubles of workspace: metrics and the list, or the scratch of teams that is too large to be
// shared.
inline int64_t window_doubles(const WindowProblem& p) {
  const int64_t samples = samples_at_once(p);
  if (for_threads(p.objective, p.classes))
    return samples * metric_stride(p.classes) + 1 + samples * windows_each(p);
  if (p.n <= kLargestShared) return 0;
  return window_team_blocks(p) * (kTeamThreads / 32) * window_team_doubles(p);
}

template <Rule R>
cudaError_t launch_window_teams(const Windows& w, const int64_t* list, double* workspace,
                                cudaStream_t stream) {
  const WindowProblem& p = w.problem;
  const int64_t scratch = window_team_doubles(p);
  const int64_t blocks = window_team_blocks(p);
  if (p.n <= kLargestShared)
    return gpu::launch(window_team_kernel<R, 16>, blocks, kTeamThreads,
                       8 * scratch * (kTeamThreads / 16), stream,
                       TeamWindows{w, list, nullptr, scratch});
  return gpu::launch(window_team_kernel<R, 32>, blocks, kTeamThreads, 0, stream,
                     TeamWindows{w, list, workspace, scratch});
}

template <Rule R, int NS>
cudaError_t launch_small_windows(const Windows& w, double* workspace, cudaStream_t stream) {
  const WindowProblem& p = w.problem;
  SmallWindows s = {w, workspace, nullptr, 0, 0, 0};
  if (!choose_tile<R, NS>(&s)) return launch_window_teams<R>(w, nullptr, nullptr, stream);
  if (R != Rule::kDamped) {
    s.list = reinterpret_cast<int64_t*>(workspace + p.samples * metric_stride(p.classes));
    const cudaError_t error = cudaMemsetAsync(s.list, 0, sizeof(int64_t), stream);
    if (error != cudaSuccess) return error;
  }
  cudaError_t error =
      gpu::launch(window_metric_kernel<R>, (p.samples + kWindowThreads - 1) / kWindowThreads,
                  kWindowThreads, 0, stream, s);
  if (error != cudaSuccess) return error;
  const int64_t across = (p.width + s.columns - 1) / s.columns;
  const int64_t down = (p.height + s.lines - 1) / s.lines;
  error = gpu::launch(window_small_kernel<R, NS>, p.samples * w.groups() * p.depth * down * across,
                      kWindowThreads, window_shared<R, NS>(s), stream, s);
  if (error != cudaSuccess || !s.list) return error;
  return launch_window_teams<R>(w, s.list, nullptr, stream);
}

// Some samples at some scales.
template <Rule R>
cudaError_t launch_part(const Windows& w, double* workspace, cudaStream_t stream) {
  const WindowProblem& p = w.problem;
  if (!for_threads(p.objective, p.classes))
    return launch_window_teams<R>(w, nullptr, workspace, stream);
  return with_contrasts(p.classes - 1, [&](auto size) {
    return launch_small_windows<R, decltype(size)::value>(w, workspace, stream);
  });
}

template <Rule R>
cudaError_t launch_windows(const WindowProblem& p, double* workspace, cudaStream_t stream) {
  const int64_t many = samples_at_once(p), bytes = p.is_double ? 8 : 4;
  const int64_t groups = p.joint ? 1 : p.channels, pixels = p.depth * p.height * p.width;
  for (int64_t first = 0; first < p.samples; first += many) {
    Windows w;
    w.problem = p;
    WindowProblem& q = w.problem;
    q.radius = q.slot = nullptr;
    q.samples = gpu::least(many, p.samples - first);
    q.rows = static_cast<const char*>(p.rows) + first * p.n * p.channels * pixels * bytes;
    q.log_prob += first * p.classes;
    if (q.label) q.label += first;
    if (q.grad) q.grad += first * p.classes;
    if (q.tau) q.tau += first;
    q.fi += first * p.scales * groups * pixels;
    if (q.rank) q.rank += first * p.scales * groups * pixels;
    for (int64_t scale = 0; scale < p.scales; scale += kMostScales) {
      w.count = static_cast<int>(gpu::least(kMostScales, p.scales - scale));
      for (int i = 0; i < w.count; ++i) {
        w.radius[i] = p.radius[scale + i];
        w.slot[i] = p.slot[scale + i];
      }
      const cudaError_t error = launch_part<R>(w, workspace, stream);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

FASTFI_END

namespace fastfi {
namespace gpu {

cudaError_t windows_exact(const WindowProblem& p, double* workspace, cudaStream_t stream);
cudaError_t windows_truncated(const WindowProblem& p, double* workspace, cudaStream_t stream);
cudaError_t windows_damped(const WindowProblem& p, double* workspace, cudaStream_t stream);

}  // namespace gpu
}  // namespace fastfi
