// Windows by teams of lanes, each from its Gram matrix: the definition, for any number of classes,
// any size of window and any objective.
#pragma once

#include "solve_team.h"

FASTFI_BEGIN

constexpr int kMostScales = 16;

// A WindowProblem as it travels to the device, with up to kMostScales scales; radius increases.
struct Windows {
  WindowProblem problem;  // radius and slot: not the device's
  int count;
  int64_t radius[kMostScales];
  int64_t slot[kMostScales];

  __host__ __device__ int64_t groups() const { return problem.joint ? 1 : problem.channels; }
  __host__ __device__ int64_t pixels() const {
    return problem.depth * problem.height * problem.width;
  }
};

__device__ inline double window_row(const WindowProblem& p, int64_t at) {
  return p.is_double ? static_cast<const double*>(p.rows)[at]
                     : static_cast<double>(static_cast<const float*>(p.rows)[at]);
}

// One window: where it is, and the pixels inside the image.
struct Window {
  int64_t sample, channel0, channel1, z0, z1, y0, y1, x0, x1;

  __device__ Window(const Windows& w, int64_t sample_, int64_t group, int64_t pixel,
                    int64_t radius) {
    const WindowProblem& p = w.problem;
    const int64_t x = pixel % p.width, y = pixel / p.width % p.height,
                  z = pixel / p.width / p.height;
    sample = sample_;
    channel0 = p.joint ? 0 : group;
    channel1 = p.joint ? p.channels : group + 1;
    z0 = gpu::most(0, z - radius), z1 = gpu::least(p.depth, z + radius + 1);
    y0 = gpu::most(0, y - radius), y1 = gpu::least(p.height, y + radius + 1);
    x0 = gpu::most(0, x - radius), x1 = gpu::least(p.width, x + radius + 1);
  }
};

// Gram matrix [n, n] of a window's rows, by a team.
template <class T>
__device__ void window_gram(const WindowProblem& p, const Window& v, double* gram) {
  const int64_t row = p.channels * p.depth * p.height * p.width, first = v.sample * p.n * row;
  for (int64_t i = 0; i < p.n; ++i) {
    FASTFI_EACH(T, j, 0, i + 1) {
      double sum = 0.0;
      for (int64_t c = v.channel0; c < v.channel1; ++c)
        for (int64_t z = v.z0; z < v.z1; ++z)
          for (int64_t y = v.y0; y < v.y1; ++y) {
            const int64_t line = first + ((c * p.depth + z) * p.height + y) * p.width;
            for (int64_t x = v.x0; x < v.x1; ++x)
              sum += window_row(p, line + i * row + x) * window_row(p, line + j * row + x);
          }
      gram[i * p.n + j] = sum;
      gram[j * p.n + i] = sum;
    }
  }
  T::sync();
}

// The solve of one sample's window, as a problem for solve_by_team.
inline __host__ __device__ SolveProblem as_solve(const WindowProblem& p) {
  return {p.rule, p.objective, nullptr,         p.log_prob, p.label,   p.grad,
          p.tau,  p.tolerance, p.row_tolerance, p.eps,      p.samples, 1,
          p.n,    p.classes,   nullptr,         nullptr};
}

struct TeamWindows {
  Windows windows;
  const int64_t* list;  // places in the output; null: all windows of all scales
  double* workspace;    // of teams of 32; those of 16 work in shared memory
  int64_t scratch;      // doubles for each team, the Gram matrix included
};

template <Rule R, int L>
__global__ void __launch_bounds__(kTeamThreads) window_team_kernel(TeamWindows s) {
  using T = Lanes<L>;
  const Windows& w = s.windows;
  const WindowProblem& p = w.problem;
  const SolveProblem solve = as_solve(p);
  const int64_t in_block = threadIdx.x / L, teams = int64_t{gridDim.x} * (kTeamThreads / L);
  const int64_t team = int64_t{blockIdx.x} * (kTeamThreads / L) + in_block;
  double* scratch = team_memory<L>(s.workspace, s.scratch);
  const int64_t groups = w.groups(), pixels = w.pixels();
  const int64_t many = s.list ? s.list[0] : p.samples * w.count * groups * pixels;
  for (int64_t i = team; i < many; i += teams) {
    int64_t at = i, scale = 0;
    if (s.list) {
      at = s.list[1 + i];
    } else {  // scales outermost: neighbouring teams have windows of one size
      scale = i / (p.samples * groups * pixels);
      const int64_t rest = i % (p.samples * groups * pixels);
      const int64_t sample = rest / (groups * pixels);
      at = (sample * p.scales + w.slot[scale]) * groups * pixels + rest % (groups * pixels);
    }
    const int64_t pixel = at % pixels, group = at / pixels % groups,
                  slot = at / (pixels * groups) % p.scales,
                  sample = at / (pixels * groups * p.scales);
    while (w.slot[scale] != slot) ++scale;
    window_gram<T>(p, Window(w, sample, group, pixel, w.radius[scale]), scratch);
    solve_by_team<R, T>(solve, scratch, sample, scratch + p.n * p.n, p.fi + at,
                        p.rank ? p.rank + at : nullptr);
  }
}

FASTFI_END
