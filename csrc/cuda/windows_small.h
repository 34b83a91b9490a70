// Windows of few classes: sums of outer products down the columns, in shared memory, growing from
// scale to scale; then one window for each thread, summed along the line and solved in registers.
// Additions only: nothing is subtracted again, so nothing cancels.
#pragma once

#include "../math/full_rank.h"
#include "../math/spectral.h"
#include "../math/window_point.h"
#include "windows_team.h"

FASTFI_BEGIN

constexpr int kWindowThreads = 128;

// Entries of a window's sums: the packed matrix and, but for kExact, the products with h.
template <Rule R, int NS>
constexpr int kSums = R == Rule::kExact ? NS * (NS + 1) / 2 : NS * (NS + 1) / 2 + NS;

// What all windows of a sample share, [window_metric_doubles] and then these.
enum { kContrasts, kClosed, kPresent, kExtra };

inline __host__ __device__ int64_t metric_stride(int64_t classes) {
  return window_metric_doubles(classes) + kExtra;
}

struct SmallWindows {
  Windows windows;
  double* metrics;         // [samples, metric_stride]
  int64_t* list;           // takes what is left; null for kDamped
  int64_t columns, lines;  // of output, of one block
  int64_t reach;           // largest radius, clipped to the width
};

// Pointers into a sample's metric. A label outside the classes leaves -1 contrasts.
inline __device__ WindowMetric metric_at(double* memory, int64_t classes) {
  WindowMetric m;
  place_metric(memory, classes, &m);
  m.r = static_cast<int64_t>(memory[window_metric_doubles(classes) + kContrasts]);
  m.all = -1.0;
  return m;
}

// One sample for each thread.
template <Rule R>
__global__ void __launch_bounds__(kWindowThreads) window_metric_kernel(SmallWindows s) {
  const WindowProblem& p = s.windows.problem;
  const int64_t sample = int64_t{blockIdx.x} * kWindowThreads + threadIdx.x, k = p.classes;
  if (sample >= p.samples) return;
  const double* log_prob = p.log_prob + sample * k;
  const double* grad = p.grad ? p.grad + sample * k : nullptr;
  const int64_t label = p.label ? p.label[sample] : 0;
  const Objective kind = static_cast<Objective>(p.objective);
  double* memory = s.metrics + sample * metric_stride(k);
  double* extra = memory + window_metric_doubles(k);
  const bool valid = label >= 0 && label < k;
  WindowMetric m;
  window_metric<R == Rule::kDamped>(log_prob, k, valid ? label : 0, grad, kind,
                                    R == Rule::kTruncated ? p.eps : 1.0, memory, &m);
  extra[kContrasts] = valid ? static_cast<double>(m.r) : -1.0;
  extra[kClosed] = full_rank_influence(memory, k, valid ? label : 0, grad, kind);
  double present = 0.0;
  for (int64_t i = 1; i < k; ++i) present += log_prob[i] > -1e300 ? 1.0 : 0.0;
  extra[kPresent] = present;
}

// The coordinates of one pixel, q [NS] (contrasts for kExact, zero for absent classes), and h.
template <Rule R, int NS>
__device__ double pixel_vector(const WindowProblem& p, const WindowMetric& m, const double* sqrt_p,
                               int64_t at, int64_t row, double* q) {
  double mean = 0.0, h = 0.0;
  FASTFI_UNROLL
  for (int k = 0; k < NS; ++k) {
    const bool here = k < m.r && (R != Rule::kExact || sqrt_p[k + 1] > 0.0);
    q[k] = here ? window_row(p, at + k * row) : 0.0;
    if (R == Rule::kExact || k >= m.r) continue;
    mean += m.prob[k] * q[k];
    h += m.slope[k] * q[k];
  }
  if constexpr (R != Rule::kExact) {
    FASTFI_UNROLL
    for (int k = 0; k < NS; ++k)
      if (k < m.r) q[k] = m.scale[k] * q[k] - m.centre[k] * mean;
  }
  return h;
}

// Where a block's tile of windows lies. What counts places in it fits 32 bits, as its sums do
// shared memory: divisions of 64-bit integers would take longer than a window's additions.
struct Tile {
  int64_t sample, group, z, y, x;
  int lines, columns, stride;

  __device__ explicit Tile(const SmallWindows& s) {
    const WindowProblem& p = s.windows.problem;
    const int64_t across = (p.width + s.columns - 1) / s.columns;
    const int64_t down = (p.height + s.lines - 1) / s.lines;
    int64_t block = blockIdx.x;
    x = block % across * s.columns, block /= across;
    y = block % down * s.lines, block /= down;
    z = block % p.depth, block /= p.depth;
    group = block % s.windows.groups();
    sample = block / s.windows.groups();
    lines = static_cast<int>(gpu::least(s.lines, p.height - y));
    columns = static_cast<int>(gpu::least(s.columns, p.width - x));
    stride = static_cast<int>(s.columns + 2 * s.reach);
  }
};

// Adds the lines that are in the windows of `radius` and not in those of `before` to the sums of
// each column: sums [lines][kSums][stride].
template <Rule R, int NS>
__device__ void add_lines(const SmallWindows& s, const Tile& t, const WindowMetric& m,
                          const double* sqrt_p, int64_t before, int64_t radius, double* sums) {
  const WindowProblem& p = s.windows.problem;
  const int64_t row = p.channels * p.depth * p.height * p.width, first = t.sample * p.n * row;
  const int64_t channel0 = p.joint ? 0 : t.group, channel1 = p.joint ? p.channels : t.group + 1;
  for (int item = threadIdx.x; item < t.lines * t.stride; item += kWindowThreads) {
    const int line = item / t.stride, column = item % t.stride;
    const int64_t x = t.x + column - s.reach, y = t.y + line;
    double* to = sums + line * (kSums<R, NS> * t.stride) + column;
    double sum[kSums<R, NS>], q[NS];
    FASTFI_UNROLL
    for (int e = 0; e < kSums<R, NS>; ++e) sum[e] = before < 0 ? 0.0 : to[e * t.stride];
    if (x >= 0 && x < p.width) {
      for (int64_t c = channel0; c < channel1; ++c)
        for (int64_t z = gpu::most(0, t.z - radius); z < gpu::least(p.depth, t.z + radius + 1); ++z)
          for (int64_t i = gpu::most(0, y - radius); i < gpu::least(p.height, y + radius + 1);
               ++i) {
            const int64_t dz = z < t.z ? t.z - z : z - t.z, dy = i < y ? y - i : i - y;
            if (gpu::most(dz, dy) <= before) continue;
            const int64_t at = first + ((c * p.depth + z) * p.height + i) * p.width + x;
            const double h = pixel_vector<R, NS>(p, m, sqrt_p, at, row, q);
            FASTFI_UNROLL
            for (int a = 0; a < NS; ++a) {
              FASTFI_UNROLL
              for (int b = 0; b <= a; ++b) sum[packed(a, b)] += q[a] * q[b];
              if (R != Rule::kExact) sum[packed(NS, a)] += h * q[a];
            }
          }
    }
    FASTFI_UNROLL
    for (int e = 0; e < kSums<R, NS>; ++e) to[e * t.stride] = sum[e];
  }
}

// One window by one thread, from the sums of its columns; whether it is finished. metric: m's
// memory, in shared memory.
template <Rule R, int NS>
__device__ bool window_by_thread(const SmallWindows& s, const Tile& t, const WindowMetric& m,
                                 const double* metric, const double* sums, int64_t across,
                                 double* fi, double* rank) {
  const WindowProblem& p = s.windows.problem;
  constexpr int kRows = R == Rule::kDamped ? NS + 2 : NS + 1;
  double a[kRows * (kRows + 1) / 2];
  FASTFI_UNROLL
  for (int e = 0; e < kSums<R, NS>; ++e) {
    double sum = sums[e * t.stride];
    for (int64_t i = 1; i <= 2 * across; ++i) sum += sums[e * t.stride + i];
    a[e] = sum;
  }
  if constexpr (R == Rule::kExact) {
    const int64_t k = p.classes;
    bool present[NS];
    FASTFI_UNROLL
    for (int i = 0; i < NS; ++i) present[i] = i + 1 < k && metric[i + 1] > 0.0;
    *fi = metric[window_metric_doubles(k) + kClosed];
    *rank = metric[window_metric_doubles(k) + kPresent];
    return surely_independent<double, NS>(a, present, p.tolerance);
  } else if constexpr (R == Rule::kTruncated) {
    a[packed(NS, NS)] = 0.0;
    double scratch[5 * NS];
    return !truncated_window<double, NS>(a, NS, p.eps, 2, -1.0, scratch, fi, rank);
  } else {
    a[packed(NS, NS)] = 0.0;
    double u[NS];
    FASTFI_UNROLL
    for (int k = 0; k < NS; ++k) u[k] = k < m.r ? m.u[k] : 0.0;
    const double tau = p.tau[t.sample];
    *fi = tau > 0.0 ? damped_window<double, NS>(a, NS, DampedForm::kClasses, u, tau) : 0.0;
    return true;
  }
}

// A window of one pixel.
template <Rule R, int NS>
__device__ void point_by_thread(const SmallWindows& s, const Tile& t, const WindowMetric& m,
                                const double* sqrt_p, int64_t pixel, double* fi, double* rank) {
  const WindowProblem& p = s.windows.problem;
  const int64_t row = p.channels * p.depth * p.height * p.width;
  const int64_t at = t.sample * p.n * row + t.group * (row / p.channels) + pixel;
  double q[NS + 1];
  q[NS] = pixel_vector<R, NS>(p, m, sqrt_p, at, row, q);
  const int64_t label = p.label ? p.label[t.sample] : 0;
  const auto coordinate = [&](int64_t k) { return of_class<NS>(q, k < m.r ? k : NS); };
  solve_point<double>(p, m, p.tau ? p.tau[t.sample] : 0.0, label, coordinate, fi, rank);
}

template <Rule R, int NS>
__global__ void __launch_bounds__(kWindowThreads) window_small_kernel(SmallWindows s) {
  FASTFI_SHARED(shared);
  const Windows& w = s.windows;
  const WindowProblem& p = w.problem;
  const Tile t(s);
  double* metric = shared;
  double* sums = metric + metric_stride(p.classes);
  const double* from = s.metrics + t.sample * metric_stride(p.classes);
  for (int64_t i = threadIdx.x; i < metric_stride(p.classes); i += kWindowThreads)
    metric[i] = from[i];
  __syncthreads();
  const WindowMetric m = metric_at(metric, p.classes);
  const bool valid = m.r >= 0;
  int64_t before = -1;
  for (int scale = 0; scale < w.count; ++scale) {
    const int64_t radius = w.radius[scale], across = gpu::least(radius, s.reach);
    const bool point = (radius == 0 || w.pixels() == 1) && (!p.joint || p.channels == 1);
    if (!point) {  // a pixel alone is read as it is; larger windows add it with their lines
      add_lines<R, NS>(s, t, m, metric, before, radius, sums);
      before = radius;
      __syncthreads();
    }
    for (int item = threadIdx.x; item < t.lines * t.columns; item += kWindowThreads) {
      const int line = item / t.columns, column = item % t.columns;
      const int64_t pixel = (t.z * p.height + t.y + line) * p.width + t.x + column;
      const int64_t slot = (t.sample * p.scales + w.slot[scale]) * w.groups() + t.group;
      const int64_t at = slot * w.pixels() + pixel;
      double fi = nan(""), rank = 0.0;
      bool done = true;
      if (valid && point)
        point_by_thread<R, NS>(s, t, m, metric, pixel, &fi, &rank);
      else if (valid)
        done = window_by_thread<R, NS>(
            s, t, m, metric, sums + line * (kSums<R, NS> * t.stride) + column + s.reach - across,
            across, &fi, &rank);
      if (!done) {
        leave(s.list, at);
        continue;
      }
      p.fi[at] = fi;
      if (p.rank) p.rank[at] = static_cast<int64_t>(rank);
    }
    __syncthreads();
  }
}

FASTFI_END
