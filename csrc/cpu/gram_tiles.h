// Gram matrices of long rows: float or double in, products and sums in double.
#pragma once

#include "../math/lanes.h"
#include "kernels.h"

FASTFI_BEGIN

constexpr int kTile = 3;                  // 3 x 3 sums and 6 operands stay in registers
constexpr int64_t kRowsPerUnit = 48;      // rows of the output that one unit computes
constexpr int64_t kBlockDoubles = 32768;  // a block of converted rows: 256 KiB

inline int64_t gram_strips(const GramProblem& p) {
  return (p.count + kRowsPerUnit - 1) / kRowsPerUnit;
}
inline int64_t gram_units(const GramProblem& p) { return p.batch * p.segments * gram_strips(p); }

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Columns of a block: as many as keep all rows of it in cache, a multiple of the lanes.
inline int64_t gram_block(const GramProblem& p) {
  if (p.count == 0) return 8;
  int64_t width = kBlockDoubles / padded(p.count, kTile) / kLanes * kLanes;
  if (width > 512) width = 512;
  const int64_t all = padded(p.columns, kLanes);
  if (width > all) width = all;
  return width < 8 ? 8 : width;
}

inline int64_t gram_scratch(const GramProblem& p) {
  const int64_t rows = padded(p.count, kTile);
  return rows * gram_block(p) + padded(kRowsPerUnit, kTile) * rows;
}

inline double lane_sum(VecD x) {
  double sum = 0.0;
  for (int l = 0; l < kLanes; ++l) sum += x[l];
  return sum;
}

template <class T>
void convert_block(const T* from, int64_t n, int64_t width, double* to) {
  for (int64_t c = 0; c < n; ++c) to[c] = static_cast<double>(from[c]);
  for (int64_t c = n; c < width; ++c) to[c] = 0.0;
}

// sums[i][j] += a_i . b_j for kTile rows of each, `width` doubles apart.
inline void tile_product(const double* a, const double* b, int64_t width, double* sums,
                         int64_t stride) {
  VecD acc[kTile][kTile] = {};
  for (int64_t c = 0; c < width; c += kLanes) {
    VecD x[kTile], y[kTile];
    for (int i = 0; i < kTile; ++i) {
      x[i] = *reinterpret_cast<const VecD*>(a + i * width + c);
      y[i] = *reinterpret_cast<const VecD*>(b + i * width + c);
    }
    for (int i = 0; i < kTile; ++i)
      for (int j = 0; j < kTile; ++j) acc[i][j] += x[i] * y[j];
  }
  for (int i = 0; i < kTile; ++i)
    for (int j = 0; j < kTile; ++j) sums[i * stride + j] += lane_sum(acc[i][j]);
}

// Rows [first, last) of one Gram matrix against rows [0, last); rows are `stride` apart.
template <class T>
void gram_strip(const T* rows, int64_t stride, int64_t columns, int64_t count, int64_t first,
                int64_t last, int64_t block, double* scratch, double* out) {
  const int64_t height = padded(last, kTile);
  double* sums = scratch + padded(count, kTile) * block;  // [last - first, height]
  for (int64_t i = 0; i < padded(last - first, kTile) * height; ++i) sums[i] = 0.0;
  for (int64_t at = 0; at < columns; at += block) {
    const int64_t n = columns - at < block ? columns - at : block;
    const int64_t width = padded(n, kLanes);
    for (int64_t i = 0; i < height; ++i)
      convert_block(rows + i * stride + at, i < last ? n : 0, width, scratch + i * width);
    for (int64_t i = first; i < last; i += kTile)
      for (int64_t j = 0; j <= i; j += kTile)
        tile_product(scratch + i * width, scratch + j * width, width,
                     sums + (i - first) * height + j, height);
  }
  for (int64_t i = first; i < last; ++i)
    for (int64_t j = 0; j <= i; ++j)
      out[i * count + j] = out[j * count + i] = sums[(i - first) * height + j];
}

// A unit is one strip of rows of one segment of one sample.
inline void gram(const GramProblem& p, int64_t begin, int64_t end, double* scratch) {
  const int64_t strips = gram_strips(p), block = gram_block(p);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit / strips, first = unit % strips * kRowsPerUnit;
    const int64_t sample = part / p.segments, segment = part % p.segments;
    const int64_t last = first + kRowsPerUnit < p.count ? first + kRowsPerUnit : p.count;
    int64_t from = 0, to = p.columns;
    if (p.offsets) {
      const int64_t* bounds = p.offsets + sample * p.offset_stride + segment;
      from = bounds[0];
      to = bounds[1];
    }
    double* out = p.out + part * p.count * p.count;
    const int64_t offset = sample * p.count * p.columns + from;
    if (p.is_double)
      gram_strip(static_cast<const double*>(p.rows) + offset, p.columns, to - from, p.count, first,
                 last, block, scratch, out);
    else
      gram_strip(static_cast<const float*>(p.rows) + offset, p.columns, to - from, p.count, first,
                 last, block, scratch, out);
  }
}

FASTFI_END
