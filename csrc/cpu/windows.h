// FI of every window of pixels: sums of outer products, then one solve for each window, kLanes
// neighbours side by side. No window's matrix outlives its solve.
#pragma once

#include "../math/exact.h"
#include "../math/spectral.h"
#include "../math/truncated.h"
#include "solve_lanes.h"
#include "window_tiles.h"

FASTFI_BEGIN

// What a unit works with; made from the thread's scratch.
struct WindowWork {
  WindowMetric metric;
  double* metric_memory;
  double* lines;      // [lines in reach][vector][stride]
  double* sums;       // [entries][stride]
  VecD* packed_sums;  // [entries + room for one row]
  VecD* square;       // [n, n]
  VecD* log_prob;     // [classes], every lane the same
  VecD* grad;
  VecD* scratch;
  const double** shell;
  double closed;  // kExact at full rank
};

inline int64_t window_solve_scratch(const WindowProblem& p) {
  const int64_t r = p.classes - 1;
  const int64_t exact = exact_scratch(p.n, p.classes);
  const int64_t truncated = most(truncated_scratch(p.n, p.classes), spectral_scratch(r));
  return p.rule == Rule::kExact ? exact : p.rule == Rule::kTruncated ? truncated : 0;
}

inline int64_t window_tile_scratch(const WindowProblem& p) {
  const int64_t m = vector_length(p), stride = tile_stride(p), lines = tile_lines(p);
  const int64_t lanes = 2 * packed_size(m + 1) + p.n * p.n + 2 * p.classes;
  return padded(window_metric_doubles(p.classes), 8) + (lines * m + packed_size(m)) * stride +
         (lanes + window_solve_scratch(p)) * kLanes + padded(lines, 8);
}

inline WindowWork window_work(const WindowProblem& p, double* memory) {
  const int64_t m = vector_length(p), stride = tile_stride(p), lines = tile_lines(p);
  WindowWork w;
  w.metric_memory = memory;
  w.lines = memory + padded(window_metric_doubles(p.classes), 8);
  w.sums = w.lines + lines * m * stride;
  w.packed_sums = reinterpret_cast<VecD*>(w.sums + packed_size(m) * stride);
  w.square = w.packed_sums + 2 * packed_size(m + 1);
  w.log_prob = w.square + p.n * p.n;
  w.grad = w.log_prob + p.classes;
  w.scratch = w.grad + p.classes;
  w.shell = reinterpret_cast<const double**>(w.scratch + window_solve_scratch(p));
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
  for (int64_t k = 0; k < p.classes; ++k) {
    w->log_prob[k] = VecD{} + log_prob[k];
    w->grad[k] = VecD{} + (grad ? grad[k] : 0.0);
  }
  if (p.rule == Rule::kExact && kind != Objective::kRow)
    w->closed = full_rank_influence(w->metric_memory, p.classes, label, grad, kind);
}

// The sum of d d^T, h's own row included, over each lane's window: square [n, n], n = r or r + 1.
// From the rows themselves: for the few windows that the fast path leaves.
inline void direct_gram(const WindowProblem& p, const WindowTile& t, int64_t r, int64_t y,
                        int64_t x, int64_t radius, VecD* vector, VecD* square) {
  const bool own_row = p.objective == static_cast<int>(Objective::kRow);
  const int64_t n = r + own_row;
  for (int64_t i = 0; i < n * n; ++i) square[i] = VecD{};
  for (int64_t c = t.channel0; c < t.channel0 + t.channels; ++c)
    for (int64_t z = most(0, t.z - radius); z < least(p.depth, t.z + radius + 1); ++z)
      for (int64_t line = most(0, y - radius); line < least(p.height, y + radius + 1); ++line)
        for (int64_t dx = -least(radius, t.rx); dx <= least(radius, t.rx); ++dx) {
          for (int64_t i = 0; i < n; ++i) {
            const int64_t at = line_offset(p, t.sample, i < r ? i : p.n - 1, c, z, line);
            for (int l = 0; l < kLanes; ++l) {
              const int64_t column = x + l + dx;
              const bool inside = column >= 0 && column < p.width;
              vector[i][l] = !inside       ? 0.0
                             : p.is_double ? static_cast<const double*>(p.rows)[at + column]
                                           : static_cast<const float*>(p.rows)[at + column];
            }
          }
          for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j <= i; ++j) square[i * n + j] += vector[i] * vector[j];
        }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < i; ++j) square[j * n + i] = square[i * n + j];
}

struct Solved {
  VecD fi, rank;
};

// One pixel and one channel: G and h are numbers.
inline Solved solve_point(const WindowProblem& p, const WindowMetric& q, double tau, int64_t label,
                          const double* vector, int64_t stride) {
  const int64_t r = q.r;
  VecD square = VecD{}, h = VecD{};
  const VecD one = VecD{} + 1.0;
  if (p.rule != Rule::kExact) {
    for (int64_t k = 0; k < r; ++k) {
      const VecD x = load(vector + k * stride);
      square += x * x;
    }
    h = load(vector + r * stride);
    const VecI keep = p.rule == Rule::kDamped ? VecI{} + (tau > 0.0 ? -1 : 0)
                                              : (VecI)(square > p.eps * p.eps);
    const VecD size = select(keep, square + (p.rule == Rule::kDamped ? tau : 0.0), one);
    return {select(keep, h * h / size, VecD{}), select(keep, one, VecD{})};
  }
  VecD mean = VecD{}, sizes = VecD{};
  for (int64_t k = 0; k < r; ++k) {
    const VecD d = load(vector + k * stride);
    mean += q.prob[k] * d;
    square += q.prob[k] * d * d;
    h += q.slope[k] * d;
    sizes += d * d;
  }
  if (p.objective == static_cast<int>(Objective::kRow))
    h = load(vector + r * stride);
  if (p.objective == static_cast<int>(Objective::kCrossEntropy))
    h = label > 0 ? mean - load(vector + (label - 1) * stride) : mean;
  square -= mean * mean;  // loses at most a factor K: class 0 is the most probable
  const VecI alive = square > 0.0;
  const VecD root = h / sqrt_of(select(alive, square, one));
  const VecD beyond = select((h != 0.0) & (sizes > 0.0), VecD{} + __builtin_inf(), VecD{});
  return {select(alive, root * root, beyond), select(sizes > 0.0, one, VecD{})};
}

// The windows whose sums are in w.packed_sums; `used` are the lanes that are wanted.
template <int NS>
Solved solve_windows(const WindowProblem& p, const WindowTile& t, WindowWork& w, int64_t y,
                     int64_t x, int64_t radius, VecI used) {
  const int64_t r = NS > 0 ? NS : w.metric.r, n = r + (p.n == p.classes);
  const Objective kind = static_cast<Objective>(p.objective);
  const double tau = p.tau ? p.tau[t.sample] : 0.0;
  const VecI label = VecI{} + (p.label ? p.label[t.sample] : 0);
  Solved s = {VecD{}, VecD{}};
  if (p.rule == Rule::kDamped) {
    if (tau > 0.0)
      s.fi = damped_window<VecD, NS>(w.packed_sums, r,
                                     kind == Objective::kRow ? nullptr : w.metric.u, tau);
    return s;
  }
  if (p.rule == Rule::kTruncated) {
    const VecI left = truncated_window<VecD, NS>(w.packed_sums, r, p.eps, w.scratch, &s.fi, &s.rank);
    if (any(left & used)) {
      VecD fi, rank;
      direct_gram(p, t, r, y, x, radius, w.scratch, w.square);
      solve_truncated<VecD, 0>(w.square, w.log_prob, label, w.grad, kind, n, r, p.tolerance, p.eps,
                               w.scratch, &fi, &rank);
      s = {select(left, fi, s.fi), select(left, rank, s.rank)};
    }
    return s;
  }
  VecI sure = VecI{};
  if (kind != Objective::kRow) {
    VecD* copy = w.packed_sums + packed_size(r);
    for (int64_t e = 0; e < packed_size(r); ++e) copy[e] = w.packed_sums[e];
    sure = surely_full_rank<VecD, NS>(copy, r, p.tolerance);
    s = {VecD{} + w.closed, VecD{} + static_cast<double>(r)};
  }
  if (any(negate(sure) & used)) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j)
        w.square[i * n + j] = w.square[j * n + i] = w.packed_sums[packed(i, j)];
    VecD fi, rank;
    if (kind == Objective::kRow)
      solve_exact<VecD, 0>(w.square, w.log_prob, label, w.grad, kind, n, r, p.tolerance,
                           p.row_tolerance, w.scratch, &fi, &rank);
    else
      solve_exact<VecD, NS>(w.square, w.log_prob, label, w.grad, kind, n, r, p.tolerance,
                            p.row_tolerance, w.scratch, &fi, &rank);
    s = {select(sure, s.fi, fi), select(sure, s.rank, rank)};
  }
  return s;
}

template <int NS>
void window_unit(const WindowProblem& p, const WindowTile& t, WindowWork& w) {
  const int64_t r = w.metric.r, stride = tile_stride(p);
  const bool own_row = p.objective == static_cast<int>(Objective::kRow);
  const int64_t m = r + (vector_length(p) - (p.classes - 1));
  const int64_t down = t.y1 - t.y0, deep = t.z1 - t.z0;
  const auto line_at = [&](int64_t c, int64_t z, int64_t y) {
    return w.lines + (((c * deep) + z - t.z0) * down + y - t.y0) * m * stride;
  };
  for (int64_t c = 0; c < t.channels; ++c)
    for (int64_t z = t.z0; z < t.z1; ++z)
      for (int64_t y = t.y0; y < t.y1; ++y) {
        double* line = line_at(c, z, y);
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
    int64_t before = -1;  // radius of the scale that the sums hold
    for (int64_t s = 0; s < p.scales; ++s) {
      const int64_t radius = p.radius[s], across = least(radius, t.rx);
      const bool point = radius == 0 && t.channels == 1;
      if (!point) {
        int64_t count = 0;
        for (int64_t c = 0; c < t.channels; ++c)
          for (int64_t z = most(t.z0, t.z - radius); z < least(t.z1, t.z + radius + 1); ++z)
            for (int64_t i = most(t.y0, y - radius); i < least(t.y1, y + radius + 1); ++i) {
              const int64_t dz = z < t.z ? t.z - z : z - t.z, dy = i < y ? y - i : i - y;
              if (most(dz, dy) > before) w.shell[count++] = line_at(c, z, i);
            }
        add_lines(w.shell, count, m, stride, before < 0, w.sums);
        before = radius;
      }
      const int64_t slot = (t.sample * p.scales + p.slot[s]) * groups + t.group;
      const int64_t at = slot * pixels + (t.z * p.height + y) * p.width;
      for (int64_t x = 0; x < t.columns; x += kLanes) {
        const int64_t many = least(kLanes, t.columns - x);
        Solved out;
        if (point) {
          out = solve_point(p, w.metric, tau, label, line_at(0, t.z, y) + t.rx + x, stride);
        } else {
          add_columns(w.sums, packed_size(m), stride, x + t.rx - across, across, w.packed_sums);
          out = solve_windows<NS>(p, t, w, y, t.x + x, radius, lane < VecI{} + many);
        }
        for (int64_t l = 0; l < many; ++l) {
          p.fi[at + t.x + x + l] = out.fi[l];
          if (p.rank) p.rank[at + t.x + x + l] = static_cast<int64_t>(out.rank[l]);
        }
      }
    }
  }
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
