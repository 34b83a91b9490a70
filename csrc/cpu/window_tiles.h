// Sums of outer products over windows of pixels: first down the columns, growing from scale to
// scale, then along the lines. Additions only: nothing is subtracted again, so nothing cancels.
#pragma once

#include "../math/pair.h"
#include "../math/window_metric.h"
#include "../math/window_solve.h"
#include "gram_tiles.h"
#include "kernels.h"

FASTFI_BEGIN

typedef double Unaligned __attribute__((vector_size(kLanes * 8), aligned(8)));

inline VecD load(const double* from) { return *reinterpret_cast<const Unaligned*>(from); }

constexpr int64_t kStrip = 8;              // lines of output that one unit computes
constexpr int64_t kSumsDoubles = 1 << 14;  // of column sums, 128 KiB

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// One unit's part of the image and what it needs around it.
struct WindowTile {
  int64_t sample, group;       // group: the colour channel, 0 for all together
  int64_t z, y, x;             // first pixel
  int64_t lines, columns;      // of output
  int64_t rz, ry, rx;          // the largest radius, clipped to the image
  int64_t z0, z1, y0, y1;      // lines in reach: z0 <= z < z1, y0 <= y < y1
  int64_t channel0, channels;  // channels in reach
};

inline int64_t window_groups(const WindowProblem& p) { return p.joint ? 1 : p.channels; }
inline int64_t clipped(const WindowProblem& p, int64_t size) {
  return least(p.radius[p.scales - 1], size - 1);
}

// Numbers that each pixel has: contrasts (or their images under WindowMetric) and, but for kExact
// in terms of the classes, h.
inline int64_t vector_length(const WindowProblem& p) {
  const bool with_h = p.rule != Rule::kExact || p.objective == static_cast<int>(Objective::kRow);
  return p.classes - 1 + (with_h ? 1 : 0);
}

// Columns of output of a tile: as many as keep the sums in the second-level cache.
inline int64_t tile_width(const WindowProblem& p) {
  const int64_t rx = clipped(p, p.width), all = padded(p.width, 2 * kLanes);
  int64_t width = kSumsDoubles / packed_size(vector_length(p)) - 2 * rx;
  width = most(least(width, 128),
               most(2 * rx, 2 * kLanes));  // the border is summed again by neighbours
  return least(padded(width, 2 * kLanes), all);
}
inline int64_t tile_stride(const WindowProblem& p) {
  return padded(tile_width(p) + 2 * clipped(p, p.width), kLanes);
}
inline int64_t reach(int64_t size, int64_t radius, int64_t own) {
  return least(size, own + 2 * radius);
}
inline int64_t tile_lines(const WindowProblem& p) {
  return (p.joint ? p.channels : 1) * reach(p.depth, clipped(p, p.depth), 1) *
         reach(p.height, clipped(p, p.height), kStrip);
}

inline int64_t window_units(const WindowProblem& p) {
  const int64_t across = (p.width + tile_width(p) - 1) / tile_width(p);
  const int64_t down = (p.height + kStrip - 1) / kStrip;
  return p.samples * window_groups(p) * p.depth * down * across;
}

inline WindowTile window_tile(const WindowProblem& p, int64_t unit) {
  const int64_t width = tile_width(p), across = (p.width + width - 1) / width;
  const int64_t down = (p.height + kStrip - 1) / kStrip, groups = window_groups(p);
  WindowTile t;
  t.x = unit % across * width;
  unit /= across;
  t.y = unit % down * kStrip;
  unit /= down;
  t.z = unit % p.depth;
  unit /= p.depth;
  t.group = unit % groups;
  t.sample = unit / groups;
  t.lines = least(kStrip, p.height - t.y);
  t.columns = least(width, p.width - t.x);
  t.rz = clipped(p, p.depth);
  t.ry = clipped(p, p.height);
  t.rx = clipped(p, p.width);
  t.z0 = most(0, t.z - t.rz);
  t.z1 = least(p.depth, t.z + t.rz + 1);
  t.y0 = most(0, t.y - t.ry);
  t.y1 = least(p.height, t.y + t.lines + t.ry);
  t.channel0 = p.joint ? 0 : t.group;
  t.channels = p.joint ? p.channels : 1;
  return t;
}

// Where row `row` of a sample holds a line of pixels.
inline int64_t line_offset(const WindowProblem& p, int64_t sample, int64_t row, int64_t channel,
                           int64_t z, int64_t y) {
  return ((((sample * p.n + row) * p.channels + channel) * p.depth + z) * p.height + y) * p.width;
}

// Pixels begin .. begin + count of a line, zeros outside the image, as doubles.
template <class T>
void copy_line(const T* line, int64_t width, int64_t begin, int64_t count, double* to) {
  const int64_t lo = least(most(0, -begin), count), hi = most(lo, least(count, width - begin));
  for (int64_t i = 0; i < lo; ++i) to[i] = 0.0;
  for (int64_t i = lo; i < hi; ++i) to[i] = static_cast<double>(line[begin + i]);
  for (int64_t i = hi; i < count; ++i) to[i] = 0.0;
}

inline void copy_row(const WindowProblem& p, const WindowTile& t, int64_t row, int64_t channel,
                     int64_t z, int64_t y, int64_t count, double* to) {
  const int64_t at = line_offset(p, t.sample, row, channel, z, y);
  if (p.is_double)
    copy_line(static_cast<const double*>(p.rows) + at, p.width, t.x - t.rx, count, to);
  else
    copy_line(static_cast<const float*>(p.rows) + at, p.width, t.x - t.rx, count, to);
}

// kLanes neighbouring numbers of a line from column x on, zeros outside the image.
template <class T>
VecD load_inside(const T* line, int64_t width, int64_t x) {
  VecD v = VecD{};
  if (x >= 0 && x + kLanes <= width)
    for (int l = 0; l < kLanes; ++l) v[l] = static_cast<double>(line[x + l]);
  else
    for (int l = 0; l < kLanes; ++l)
      if (x + l >= 0 && x + l < width) v[l] = static_cast<double>(line[x + l]);
  return v;
}
inline VecD load_row(const WindowProblem& p, int64_t offset, int64_t x) {
  return p.is_double ? load_inside(static_cast<const double*>(p.rows) + offset, p.width, x)
                     : load_inside(static_cast<const float*>(p.rows) + offset, p.width, x);
}

// d [r] of every pixel of a line becomes q, and h is put behind it: vectors [r + 1, stride].
inline void to_metric(const WindowMetric& metric, bool own_row, int64_t stride, double* line) {
  const int64_t r = metric.r;
  for (int64_t x = 0; x < stride; x += kLanes) {
    VecD mean = VecD{}, h = VecD{};
    for (int64_t k = 0; k < r; ++k) {
      const VecD d = *reinterpret_cast<VecD*>(line + k * stride + x);
      mean += metric.prob[k] * d;
      h += metric.slope[k] * d;
    }
    for (int64_t k = 0; k < r; ++k) {
      VecD* d = reinterpret_cast<VecD*>(line + k * stride + x);
      *d = metric.scale[k] * *d - metric.centre[k] * mean;
    }
    if (!own_row) *reinterpret_cast<VecD*>(line + r * stride + x) = h;
  }
}

// sums(i, j) (+)= sum over L lines of v_i v_j, for every column.
template <int L>
void add_products(const double* const* line, int64_t m, int64_t stride, bool first, double* sums) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t x = 0; x < stride; x += kLanes) {
      VecD own[L];
      for (int l = 0; l < L; ++l) own[l] = *reinterpret_cast<const VecD*>(line[l] + i * stride + x);
      for (int64_t j = 0; j <= i; ++j) {
        VecD* to = reinterpret_cast<VecD*>(sums + packed(i, j) * stride + x);
        VecD sum = first ? VecD{} : *to;
        for (int l = 0; l < L; ++l)
          sum += own[l] * *reinterpret_cast<const VecD*>(line[l] + j * stride + x);
        *to = sum;
      }
    }
}

inline void add_lines(const double* const* line, int64_t count, int64_t m, int64_t stride,
                      bool first, double* sums) {
  for (; count >= 3; count -= 3, line += 3, first = false)
    add_products<3>(line, m, stride, first, sums);
  if (count == 2) add_products<2>(line, m, stride, first, sums);
  if (count == 1) add_products<1>(line, m, stride, first, sums);
  if (count == 0 && first)  // never without a line: the window's own
    for (int64_t i = 0; i < packed_size(m) * stride; ++i) sums[i] = 0.0;
}

template <class V>
V load_lanes(const double* from) {
  if constexpr (Traits<V>::kLanes == kLanes)
    return load(from);
  else
    return {load(from), load(from + kLanes)};
}

// Sums of neighbouring windows of 2 radius + 1 columns, the first from column x on: out [entries].
template <class V>
void add_columns(const double* sums, int64_t entries, int64_t stride, int64_t x, int64_t radius,
                 V* out) {
  for (int64_t e = 0; e < entries; ++e) {
    const double* from = sums + e * stride + x;
    V total = load_lanes<V>(from);
    for (int64_t i = 1; i <= 2 * radius; ++i) total += load_lanes<V>(from + i);
    out[e] = total;
  }
}

FASTFI_END
