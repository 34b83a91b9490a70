// FI of every window of pixels: sums of outer products, then one solve for each window, 2 kLanes
// neighbours side by side. No window's matrix outlives its solve.
#pragma once

#include "../math/window_point.h"
#include "solve_lanes.h"
#include "window_lanes.h"

FASTFI_BEGIN

// Entries of the sums. A window is solved from them only if it has at least r pixels, so that r is
// at most the largest number of pixels too.
inline int64_t sums_size(const WindowProblem& p) {
  const int64_t h = vector_length(p) - (p.classes - 1);
  return packed_size(least(p.classes - 1, most_pixels(p)) + h);
}

inline int64_t window_tile_scratch(const WindowProblem& p) {
  const int64_t m = vector_length(p), stride = tile_stride(p), lines = tile_lines(p);
  return padded(window_metric_doubles(p.classes), 8) + (lines * m + sums_size(p)) * stride +
         padded(lines, 8) + 3 * kLanes * (sums_size(p) + 1) +
         (1 + 4 * p.classes + 2 * matrix_size(p) + window_solve_scratch(p)) * kLanes;
}

inline WindowWork window_work(const WindowProblem& p, double* memory) {
  const int64_t m = vector_length(p), stride = tile_stride(p), lines = tile_lines(p);
  WindowWork w;
  w.metric_memory = memory;
  w.lines = memory + padded(window_metric_doubles(p.classes), 8);
  w.sums = w.lines + lines * m * stride;
  w.inside = reinterpret_cast<const double**>(w.sums + sums_size(p) * stride);
  w.label = reinterpret_cast<VecI*>(w.sums + sums_size(p) * stride + padded(lines, 8));
  w.log_prob = reinterpret_cast<VecD*>(w.label + 1);
  w.grad = w.log_prob + p.classes;
  w.sqrt_p = w.grad + p.classes;
  w.weight2 = w.sqrt_p + p.classes;
  w.matrix = reinterpret_cast<Pair*>(w.weight2 + p.classes);
  w.scratch = reinterpret_cast<VecD*>(w.matrix + matrix_size(p));
  w.waiting = reinterpret_cast<double*>(w.scratch + window_solve_scratch(p));
  w.place = reinterpret_cast<int64_t*>(w.waiting + 3 * kLanes * sums_size(p));
  w.count = 0;
  return w;
}

inline void prepare_sample(const WindowProblem& p, int64_t sample, WindowWork* w) {
  const double* log_prob = p.log_prob + sample * p.classes;
  const double* grad = p.grad ? p.grad + sample * p.classes : nullptr;
  const int64_t label = p.label ? p.label[sample] : 0;
  const Objective kind = static_cast<Objective>(p.objective);
  if (p.rule == Rule::kDamped)
    window_metric<true>(log_prob, p.classes, label, grad, kind, 0.0, w->metric_memory, &w->metric);
  else
    window_metric<false>(log_prob, p.classes, label, grad, kind,
                         p.rule == Rule::kTruncated ? p.eps : 1.0, w->metric_memory, &w->metric);
  *w->label = VecI{} + label;
  for (int64_t k = 0; k < p.classes; ++k) {
    w->log_prob[k] = VecD{} + log_prob[k];
    w->grad[k] = VecD{} + (grad ? grad[k] : 0.0);
    if (k > 0) w->weight2[k - 1] = VecD{} + log_prob[k] * 1.4426950408889634;
  }
  class_weights(w->log_prob, p.classes, w->sqrt_p);
  if (p.rule == Rule::kExact && kind != Objective::kRow)
    w->closed = full_rank_influence(w->metric_memory, p.classes, label, grad, kind);
}

// The lines of pixels in reach of a unit's windows.
struct TileLines {
  const WindowTile& t;
  double* lines;
  int64_t size;  // of one, in doubles

  double* at(int64_t c, int64_t z, int64_t y) const {
    const int64_t down = t.y1 - t.y0, deep = t.z1 - t.z0;
    return lines + ((c * deep + z - t.z0) * down + y - t.y0) * size;
  }

  // Appends those of the windows of `radius` around line y that are not in those of `before`.
  int64_t append(int64_t y, int64_t radius, int64_t before, const double** to, int64_t n) const {
    for (int64_t c = 0; c < t.channels; ++c)
      for (int64_t z = most(t.z0, t.z - radius); z < least(t.z1, t.z + radius + 1); ++z)
        for (int64_t i = most(t.y0, y - radius); i < least(t.y1, y + radius + 1); ++i) {
          const int64_t dz = z < t.z ? t.z - z : z - t.z, dy = i < y ? y - i : i - y;
          if (most(dz, dy) > before) to[n++] = at(c, z, i);
        }
    return n;
  }
};

template <int NS>
void window_unit(const WindowProblem& p, const WindowTile& t, WindowWork& w) {
  const int64_t r = w.metric.r, stride = tile_stride(p);
  const bool own_row = p.objective == static_cast<int>(Objective::kRow);
  const int64_t m = r + (vector_length(p) - (p.classes - 1));
  const TileLines reach = {t, w.lines, m * stride};
  for (int64_t c = 0; c < t.channels; ++c)
    for (int64_t z = t.z0; z < t.z1; ++z)
      for (int64_t y = t.y0; y < t.y1; ++y) {
        double* line = reach.at(c, z, y);
        for (int64_t i = 0; i < r + own_row; ++i)
          copy_row(p, t, i < r ? i : p.n - 1, t.channel0 + c, z, y, stride, line + i * stride);
        if (p.rule != Rule::kExact) to_metric(w.metric, own_row, stride, line);
      }
  const int64_t groups = window_groups(p), pixels = p.depth * p.height * p.width;
  const double tau = p.tau ? p.tau[t.sample] : 0.0;
  const int64_t label = p.label ? p.label[t.sample] : 0;
  VecI lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  for (int64_t y = t.y; y < t.y + t.lines; ++y) {
    WindowGroup g = {y, 0, -1, 0, 0};
    int64_t summed = 0;  // lines that w.sums hold
    for (int64_t s = 0; s < p.scales; ++s) {
      g.lines = reach.append(y, p.radius[s], g.radius, w.inside, g.lines);
      g.radius = p.radius[s];
      g.across = least(g.radius, t.rx);
      const bool point = g.pixels() == 1;
      if (!point && g.pixels() >= r) {
        add_lines(w.inside + summed, g.lines - summed, m, stride, summed == 0, w.sums);
        summed = g.lines;
      }
      const int64_t slot = (t.sample * p.scales + p.slot[s]) * groups + t.group;
      const int64_t at = slot * pixels + (t.z * p.height + y) * p.width;
      for (int64_t x = 0; x < t.columns; x += 2 * kLanes) {
        const int64_t many = least(2 * kLanes, t.columns - x);
        Solved<Pair> out;
        if (point) {
          const double* vector = w.inside[0] + t.rx + x;
          const auto lo = [&](int64_t k) { return load(vector + k * stride); };
          const auto hi = [&](int64_t k) { return load(vector + k * stride + kLanes); };
          solve_point<VecD>(p, w.metric, tau, label, lo, &out.fi.lo, &out.rank.lo);
          solve_point<VecD>(p, w.metric, tau, label, hi, &out.fi.hi, &out.rank.hi);
        } else {
          const PairMask used = {lane < VecI{} + many, lane < VecI{} + (many - kLanes)};
          g.x = t.x + x;
          out = solve_group<NS>(p, t, w, g, x + t.rx - g.across, at + g.x, used);
        }
        for (int64_t l = 0; l < many; ++l) {
          const int64_t to = at + t.x + x + l, i = l % kLanes;
          p.fi[to] = l < kLanes ? out.fi.lo[i] : out.fi.hi[i];
          if (p.rank)
            p.rank[to] = static_cast<int64_t>(l < kLanes ? out.rank.lo[i] : out.rank.hi[i]);
        }
        while (w.count >= kLanes) solve_waiting<NS>(p, w);
      }
    }
  }
  if (w.count > 0) solve_waiting<NS>(p, w);
}

typedef void (*WindowFunction)(const WindowProblem&, const WindowTile&, WindowWork&);

template <int NS>
WindowFunction window_compiled_for(int64_t r) {
  if (r == NS) return window_unit<NS>;
  if constexpr (NS > 1)
    return window_compiled_for<NS - 1>(r);
  else
    return window_unit<0>;
}

inline void windows(const WindowProblem& p, int64_t begin, int64_t end, double* scratch) {
  WindowWork w = window_work(p, scratch);
  int64_t sample = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const WindowTile t = window_tile(p, unit);
    if (t.sample != sample) prepare_sample(p, sample = t.sample, &w);
    window_compiled_for<kLargestCompiled>(w.metric.r)(p, t, w);
  }
}

FASTFI_END
