// Gram matrices of a layer's weight gradients W_r = d_r^T a, by the ghost identity
//
//   S = a a^T (positions x positions),  H_r = d_r S,  N_rs = <H_r, d_s>,
//
// everything in double, for one sample and group at a time: no patch matrix is formed, because S
// follows from the pixels' own products, and d is read once, a tile of outputs at a time.
#pragma once

#include "gram_tiles.h"
#include "kernels.h"

FASTFI_BEGIN

constexpr int64_t kGhostChannels = 64;    // channels converted at once
constexpr int64_t kGhostDoubles = 16384;  // a tile of d: 128 KiB

// Pixels whose products are needed: all, or where each patch is one pixel, those of the patches.
inline int64_t ghost_pixels(const GhostProblem& p) { return p.taps == 1 ? p.positions : p.pixels; }

inline int64_t ghost_tile(const GhostProblem& p) {
  const int64_t each = padded(p.rows, kTile) * padded(p.positions, kLanes);
  int64_t tile = kGhostDoubles / each / 4 * 4;
  const int64_t all = padded(p.outputs, 4);
  if (tile > all) tile = all;
  return tile < 4 ? 4 : tile;
}

inline int64_t ghost_scratch(const GhostProblem& p) {
  const int64_t pixels = ghost_pixels(p), wide = padded(pixels, kLanes);
  const int64_t width = padded(p.positions, kLanes), rows = padded(p.rows, kTile);
  const int64_t products = padded(pixels, 4) * wide;
  const int64_t tile = ghost_tile(p) * width;
  return kGhostChannels * wide + products + padded(p.positions, 4) * width + (rows + kTile) * tile +
         rows * rows + 64;
}

inline int64_t ghost_units(const GhostProblem& p) { return p.batch; }

// c[i][j] += sum_k a[k][i] b[k][j] (or a[i][k], by the strides) for I rows and J vectors.
template <int I, int J>
inline void rank_update(const double* a, int64_t a_row, int64_t a_step, const double* b,
                        int64_t b_step, int64_t steps, double* c, int64_t c_row) {
  VecD acc[I][J];
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j)
      acc[i][j] = *reinterpret_cast<const VecD*>(c + i * c_row + j * kLanes);
  for (int64_t k = 0; k < steps; ++k) {
    VecD y[J];
    for (int j = 0; j < J; ++j) y[j] = *reinterpret_cast<const VecD*>(b + k * b_step + j * kLanes);
    for (int i = 0; i < I; ++i) {
      const double x = a[i * a_row + k * a_step];
      for (int j = 0; j < J; ++j) acc[i][j] += x * y[j];
    }
  }
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j) *reinterpret_cast<VecD*>(c + i * c_row + j * kLanes) = acc[i][j];
}

// The same for 4 rows and `vectors` vectors.
inline void four_rows(const double* a, int64_t a_row, int64_t a_step, const double* b,
                      int64_t b_step, int64_t steps, double* c, int64_t c_row, int64_t vectors) {
  int64_t j = 0;
  for (; j + 4 <= vectors; j += 4)
    rank_update<4, 4>(a, a_row, a_step, b + j * kLanes, b_step, steps, c + j * kLanes, c_row);
  for (; j + 2 <= vectors; j += 2)
    rank_update<4, 2>(a, a_row, a_step, b + j * kLanes, b_step, steps, c + j * kLanes, c_row);
  for (; j < vectors; ++j)
    rank_update<4, 1>(a, a_row, a_step, b + j * kLanes, b_step, steps, c + j * kLanes, c_row);
}

inline void clear(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 0.0;
}

// products[q][r] = sum over channels of x_q x_r, for the pixels that are needed.
template <class T>
void pixel_products(const GhostProblem& p, const T* x, double* block, double* products) {
  const int64_t pixels = ghost_pixels(p), wide = padded(pixels, kLanes);
  clear(products, padded(pixels, 4) * wide);
  for (int64_t first = 0; first < p.channels; first += kGhostChannels) {
    const int64_t count = p.channels - first < kGhostChannels ? p.channels - first : kGhostChannels;
    for (int64_t c = 0; c < count; ++c) {
      const T* from = x + (first + c) * p.x_channel;
      double* to = block + c * wide;
      if (p.taps == 1) {
        for (int64_t q = 0; q < pixels; ++q)
          to[q] = p.at[q] < 0 ? 0.0 : static_cast<double>(from[p.at[q] * p.x_pixel]);
      } else {
        for (int64_t q = 0; q < pixels; ++q) to[q] = static_cast<double>(from[q * p.x_pixel]);
      }
      for (int64_t q = pixels; q < wide; ++q) to[q] = 0.0;
    }
    // Rows q..q+3 against columns from q's vector on: the rest is the mirror image. Where pixels is
    // no multiple of 4, the last rows read the padding or the next channel, and are not used.
    for (int64_t q = 0; q < pixels; q += 4) {
      const int64_t from = q / kLanes * kLanes;
      four_rows(block + q, 1, wide, block + from, wide, count, products + q * wide + from, wide,
                (wide - from) / kLanes);
    }
  }
  for (int64_t q = 0; q < pixels; ++q)
    for (int64_t r = 0; r < q; ++r) products[q * wide + r] = products[r * wide + q];
}

// s[t][u] = sum over taps of the products of the pixels under them.
inline void patch_products(const GhostProblem& p, const double* products, double* s) {
  const int64_t wide = padded(ghost_pixels(p), kLanes), width = padded(p.positions, kLanes);
  clear(s, padded(p.positions, 4) * width);
  for (int64_t t = 0; t < p.positions; ++t)
    for (int64_t k = 0; k < p.taps; ++k) {
      const int64_t q = p.at[t * p.taps + k];
      if (q < 0) continue;
      const double* row = products + q * wide;
      const int32_t* other = p.at + t * p.taps + k;
      double* to = s + t * width;
      for (int64_t u = t; u < p.positions; ++u, other += p.taps)
        if (*other >= 0) to[u] += row[*other];
    }
  for (int64_t t = 0; t < p.positions; ++t)
    for (int64_t u = 0; u < t; ++u) s[t * width + u] = s[u * width + t];
}

// convert_block for rows too short for the compiler's loop.
template <class T>
inline void convert_four(const T* from, int64_t width, double* to) {
  for (int i = 0; i < 4; ++i) to[i] = static_cast<double>(from[i]);
  for (int64_t i = 4; i < width; ++i) to[i] = 0.0;
}

// One tile of one row: [tile, width], zero beyond the outputs and the positions.
template <class T>
void load_cotangent(const GhostProblem& p, const T* d, int64_t outputs, int64_t tile, double* to) {
  const int64_t width = padded(p.positions, kLanes);
  if (p.d_position == 1) {
    if (width == p.positions && width == p.d_output)  // no gaps
      convert_block(d, outputs * width, outputs * width, to);
    else if (p.positions == 4)
      for (int64_t o = 0; o < outputs; ++o) convert_four(d + o * p.d_output, width, to + o * width);
    else
      for (int64_t o = 0; o < outputs; ++o)
        convert_block(d + o * p.d_output, p.positions, width, to + o * width);
    clear(to + outputs * width, (tile - outputs) * width);
    return;
  }
  clear(to, tile * width);
  for (int64_t t = 0; t < p.positions; ++t)
    for (int64_t o = 0; o < outputs; ++o)
      to[o * width + t] = static_cast<double>(d[t * p.d_position + o * p.d_output]);
}

template <class X, class D>
void ghost_sample(const GhostProblem& p, int64_t sample, double* scratch) {
  const int64_t pixels = ghost_pixels(p), wide = padded(pixels, kLanes);
  const int64_t width = padded(p.positions, kLanes), rows = padded(p.rows, kTile);
  const int64_t tile = ghost_tile(p), size = tile * width;
  double* block = scratch;
  double* products = block + kGhostChannels * wide;
  double* s = products + padded(pixels, 4) * wide;
  double* cotangents = s + padded(p.positions, 4) * width;  // [rows, tile, width]
  double* h = cotangents + rows * size;                     // [kTile, tile, width]
  double* sums = h + kTile * size;                          // [rows, rows]
  clear(sums, rows * rows);
  for (int64_t g = 0; g < p.groups; ++g) {
    const X* x = static_cast<const X*>(p.x) + sample * p.x_sample + g * p.channels * p.x_channel;
    pixel_products(p, x, block, products);
    const double* inner = products;
    if (p.taps > 1) {
      patch_products(p, products, s);
      inner = s;
    }
    for (int64_t first = 0; first < p.outputs; first += tile) {
      const int64_t outputs = p.outputs - first < tile ? p.outputs - first : tile;
      const int64_t offset = sample * p.d_sample + (g * p.outputs + first) * p.d_output;
      for (int64_t r = 0; r < rows; ++r)
        if (r < p.rows)
          load_cotangent(p, static_cast<const D*>(p.d[r]) + offset, outputs, tile,
                         cotangents + r * size);
        else
          clear(cotangents + r * size, size);
      for (int64_t r = 0; r < rows; r += kTile) {
        clear(h, kTile * size);
        for (int64_t o = 0; o < kTile * tile; o += 4)
          four_rows(cotangents + r * size + o * width, width, 1, inner, width, p.positions,
                    h + o * width, width, width / kLanes);
        for (int64_t q = 0; q <= r; q += kTile)
          tile_product(h, cotangents + q * size, size, sums + r * rows + q, rows);
      }
    }
  }
  double* out = p.out + sample * p.rows * p.rows;
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t q = 0; q <= r; ++q) out[r * p.rows + q] = out[q * p.rows + r] = sums[r * rows + q];
}

// A unit is one sample.
inline void ghost(const GhostProblem& p, int64_t begin, int64_t end, double* scratch) {
  for (int64_t sample = begin; sample < end; ++sample) {
    if (p.x_double)
      p.d_double ? ghost_sample<double, double>(p, sample, scratch)
                 : ghost_sample<double, float>(p, sample, scratch);
    else
      p.d_double ? ghost_sample<float, double>(p, sample, scratch)
                 : ghost_sample<float, float>(p, sample, scratch);
  }
}

FASTFI_END
