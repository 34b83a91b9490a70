// Solves of the windows around 2 kLanes neighbouring pixels, from sums or from the pixels.
//
// A window with at least as many coordinates as contrasts is solved in the space of the classes,
// from sums of outer products; one with fewer in the space of its pixels, whose matrix is smaller.
#pragma once

#include "../math/exact.h"
#include "../math/spectral.h"
#include "../math/truncated.h"
#include "window_tiles.h"

FASTFI_BEGIN

// What a unit works with; made from the thread's scratch.
struct WindowWork {
  WindowMetric metric;
  double* metric_memory;
  double* lines;          // [lines in reach][vector][stride]
  double* sums;           // [entries][stride]
  const double** inside;  // lines of a window, those of smaller scales first
  VecI* label;            // every lane the same here and below
  VecD* log_prob;         // [classes]
  VecD* grad;             // [classes]
  VecD* sqrt_p;           // [classes]
  VecD* weight2;          // [classes - 1]
  Pair* matrix;           // packed
  VecD* scratch;
  double closed;  // kExact at full rank
  // kExact: windows that wait for a full solve, packed sums [3 kLanes, entries] and their place in
  // the output.
  double* waiting;
  int64_t* place;
  int64_t count;
};

// The windows of one group of pixels.
struct WindowGroup {
  int64_t y, x;            // the first lane's pixel
  int64_t radius, across;  // across: clipped to the image's width
  int64_t lines;           // inside the window, over all channels
  int64_t pixels() const { return lines * (2 * across + 1); }
};

template <class V>
struct Solved {
  V fi, rank;
};

// The largest number of coordinates of a window, and of those solved in the space of their pixels.
inline int64_t most_pixels(const WindowProblem& p) {
  const int64_t depth = 2 * clipped(p, p.depth) + 1, height = 2 * clipped(p, p.height) + 1;
  const int64_t width = 2 * clipped(p, p.width) + 1;
  return (p.joint ? p.channels : 1) * least(depth, p.depth) * least(height, p.height) * width;
}
inline int64_t most_pixel_space(const WindowProblem& p) {
  return least(most_pixels(p), p.classes - 2 > 0 ? p.classes - 2 : 1);
}

// Entries of the packed matrix of a window, with room for the copies that its solve makes.
inline int64_t matrix_size(const WindowProblem& p) {
  const int64_t pixels = packed_size(most_pixel_space(p) + 2);
  // Samples with absent classes may have fewer contrasts than there are pixels.
  const int64_t classes = packed_size(least(p.classes, most_pixels(p) + 2) + 2);
  return most(pixels, 2 * classes);
}

inline int64_t window_solve_scratch(const WindowProblem& p) {
  const int64_t n = p.n, r = p.classes - 1, d = most_pixel_space(p), c = least(r, most_pixels(p));
  const int64_t exact_pixels =
      2 * d * n + 2 * d + r + weighted_pivots_scratch(d, r) + exact_coordinates_scratch(d, n, r);
  const int64_t exact_classes = (c + 1) * (c + 1) + exact_scratch(c + 1, c + 1);
  const int64_t truncated_pixels =
      2 * d * (r + 1) + d * n + truncated_factor_scratch(d, r + 1) + 2 * spectral_scratch(d);
  const int64_t truncated_classes =
      (c + 1) * (c + 1) + rotations_scratch(c + 1, c + 1) + 2 * spectral_scratch(c) + n;
  if (p.rule == Rule::kExact) return most(exact_pixels, exact_classes);
  if (p.rule == Rule::kTruncated) return most(truncated_pixels, truncated_classes);
  return 2 * d * (r + 1);
}

// Calls use(i, vector) for every pixel of the windows: vector [n] holds the contrasts of kLanes
// neighbours, h's own row last; zeros outside the image. From the rows themselves.
template <class Use>
void each_pixel(const WindowProblem& p, const WindowTile& t, const WindowGroup& g, int64_t n,
                VecD* vector, Use use) {
  const bool own_row = p.objective == static_cast<int>(Objective::kRow);
  int64_t pixel = 0;
  for (int64_t c = t.channel0; c < t.channel0 + t.channels; ++c)
    for (int64_t z = most(0, t.z - g.radius); z < least(p.depth, t.z + g.radius + 1); ++z)
      for (int64_t y = most(0, g.y - g.radius); y < least(p.height, g.y + g.radius + 1); ++y)
        for (int64_t dx = -g.across; dx <= g.across; ++dx, ++pixel) {
          for (int64_t i = 0; i < n; ++i) {
            const int64_t row = own_row && i == n - 1 ? p.n - 1 : i;
            vector[i] = load_row(p, line_offset(p, t.sample, row, c, z, y), g.x + dx);
          }
          use(pixel, vector);
        }
}

// The pixels' vectors as the lines hold them: out [pixels, count], of V's lanes from column x on.
template <class V>
void gather_pixels(const WindowWork& w, const WindowGroup& g, int64_t count, int64_t stride,
                   int64_t x, V* out) {
  for (int64_t line = 0; line < g.lines; ++line)
    for (int64_t i = 0; i <= 2 * g.across; ++i)
      for (int64_t k = 0; k < count; ++k)
        *out++ = load_lanes<V>(w.inside[line] + k * stride + x + i);
}

// kExact with fewer pixels than contrasts: the pixels are the coordinates. Where their own Gram
// matrix shows that none depends on the others, nothing more is needed; elsewhere the rank is found
// as pivoted_cholesky() does, by the largest residual.
inline Solved<VecD> exact_from_pixels(const WindowProblem& p, WindowWork& w, const WindowGroup& g,
                                      int64_t column, VecI wanted) {
  const Objective kind = static_cast<Objective>(p.objective);
  const int64_t r = w.metric.r, n = r + (kind == Objective::kRow), d = g.pixels();
  VecD* pixels = w.scratch;
  VecD* inv_pivot = pixels + d * n;
  VecI* pivot = reinterpret_cast<VecI*>(inv_pivot + d);
  VecD* equal = reinterpret_cast<VecD*>(pivot + d);
  VecD* gram = reinterpret_cast<VecD*>(w.matrix);
  Coordinates<VecD> c;
  c.factor = equal + r;
  VecD* rest = c.factor + d * n;
  gather_pixels(w, g, n, tile_stride(p), column, pixels);
  c.largest = VecD{};
  for (int64_t k = 0; k < r; ++k) {
    VecD square = VecD{};
    for (int64_t i = 0; i < d; ++i) square += pixels[i * n + k] * pixels[i * n + k];
    c.largest = select(square > c.largest, square, c.largest);
    equal[k] = VecD{};
  }
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j <= i; ++j) gram[packed(i, j)] = dot(pixels + i * n, pixels + j * n, r);
  // d eigenvalues above x leave, at every step before the d-th, a residual above x / r.
  const double least = 2.0 * static_cast<double>(r) * p.tolerance;
  const VecI sure = surely_above<VecD, 0>(gram, d, c.largest * least) & (c.largest > 0.0);
  c.dimension = VecD{} + static_cast<double>(d);
  c.smallest = c.largest;  // no Gram matrix's rounding to be magnified
  if (any(wanted & negate(sure))) {
    // The rank is that of a Gram matrix in float64, but coordinates are exact: short rows count.
    const double noise = 64.0 * 2.220446049250313e-16 * static_cast<double>(d);
    const double dead = p.row_tolerance > noise * noise ? p.row_tolerance : noise * noise;
    const VecD rank = weighted_pivots(pixels, equal, d, n, r, c.largest * p.tolerance,
                                      c.largest * dead, c.factor, inv_pivot, pivot, rest);
    c.dimension = select(sure, c.dimension, rank);
    gather_pixels(w, g, n, tile_stride(p), column, pixels);
    for (int64_t i = 0; i < d * n; ++i) c.factor[i] = select(sure, pixels[i], c.factor[i]);
  } else {
    c.factor = pixels;
  }
  Solved<VecD> s;
  solve_coordinates(c, w.sqrt_p, w.weight2, *w.label, w.grad, kind, n, r, d, p.row_tolerance, rest,
                    &s.fi, &s.rank);
  return s;
}

// kExact: windows that are not surely of full rank wait until there are enough of them for all
// lanes. Takes `wanted` lanes of the group's sums; `place` is the first lane's in the output.
inline void wait_for_solve(const WindowProblem& p, WindowWork& w, const WindowGroup& g,
                           int64_t column, int64_t n, int64_t place, PairMask wanted) {
  const int64_t entries = packed_size(n);
  add_columns(w.sums, entries, tile_stride(p), column, g.across, w.matrix);
  const double* lanes = reinterpret_cast<const double*>(w.matrix);
  const VecI masks[2] = {wanted.lo, wanted.hi};
  const int64_t* flags = reinterpret_cast<const int64_t*>(masks);
  for (int64_t l = 0; l < 2 * kLanes; ++l) {
    if (flags[l] == 0) continue;
    double* to = w.waiting + w.count * entries;
    for (int64_t e = 0; e < entries; ++e) to[e] = lanes[e * 2 * kLanes + l];
    w.place[w.count++] = place + l;
  }
}

// kExact of the Gram matrices [n, n] in w.scratch.
template <int NS>
Solved<VecD> solve_square(const WindowProblem& p, WindowWork& w, int64_t n) {
  const Objective kind = static_cast<Objective>(p.objective);
  VecD* square = w.scratch;
  Solved<VecD> s;
  if (kind == Objective::kRow)
    solve_exact<VecD, 0>(square, w.log_prob, *w.label, w.grad, kind, n, w.metric.r, p.tolerance,
                         p.row_tolerance, square + n * n, &s.fi, &s.rank);
  else
    solve_exact<VecD, NS>(square, w.log_prob, *w.label, w.grad, kind, n, w.metric.r, p.tolerance,
                          p.row_tolerance, square + n * n, &s.fi, &s.rank);
  return s;
}

// Solves kLanes of the waiting windows, or the `count` that are left.
template <int NS>
void solve_waiting(const WindowProblem& p, WindowWork& w) {
  const Objective kind = static_cast<Objective>(p.objective);
  const int64_t r = w.metric.r, n = r + (kind == Objective::kRow);
  const int64_t many = least(w.count, kLanes), first = w.count - many;
  VecD* square = w.scratch;
  for (int64_t l = 0; l < kLanes; ++l) {
    const double* from = w.waiting + (first + (l < many ? l : 0)) * packed_size(n);
    double* to = reinterpret_cast<double*>(square) + l;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) to[(i * n + j) * kLanes] = from[packed(i, j)];
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < i; ++j) square[j * n + i] = square[i * n + j];
  const Solved<VecD> s = solve_square<NS>(p, w, n);
  for (int64_t l = 0; l < many; ++l) {
    p.fi[w.place[first + l]] = s.fi[l];
    if (p.rank) p.rank[w.place[first + l]] = static_cast<int64_t>(s.rank[l]);
  }
  w.count = first;
}

// kTruncated by rotations that keep small singular values' digits, some ten times as slow.
inline Solved<VecD> truncated_again(const WindowProblem& p, const WindowTile& t, WindowWork& w,
                                    const WindowGroup& g) {
  const Objective kind = static_cast<Objective>(p.objective);
  const int64_t r = w.metric.r, n = r + (kind == Objective::kRow), d = g.pixels();
  VecD* vector = w.scratch;
  VecD* store = vector + n;
  Solved<VecD> s;
  if (d < r) {
    each_pixel(p, t, g, n, vector, [&](int64_t i, const VecD* v) {
      for (int64_t k = 0; k < n; ++k) store[i * n + k] = v[k];
    });
    solve_factor(store, w.sqrt_p, *w.label, w.grad, kind, n, r, d, d, p.eps, store + d * n, &s.fi,
                 &s.rank);
    return s;
  }
  for (int64_t i = 0; i < n * n; ++i) store[i] = VecD{};
  each_pixel(p, t, g, n, vector, [&](int64_t, const VecD* v) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) store[i * n + j] += v[i] * v[j];
  });
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < i; ++j) store[j * n + i] = store[i * n + j];
  solve_by_rotations<VecD, 0>(store, w.log_prob, *w.label, w.grad, kind, n, r, p.tolerance, p.eps,
                              store + n * n, &s.fi, &s.rank);
  return s;
}

// The pixels' metric and h in w.matrix, packed as sums are: entry (i, j) = q_i . q_j, last row h.
inline void pixel_metric(WindowWork& w, const WindowGroup& g, int64_t stride, int64_t column) {
  const int64_t r = w.metric.r, d = g.pixels();
  Pair* q = reinterpret_cast<Pair*>(w.scratch);  // [d, r + 1]
  gather_pixels(w, g, r + 1, stride, column, q);
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j <= i; ++j)
      w.matrix[packed(i, j)] = dot(q + i * (r + 1), q + j * (r + 1), r);
    w.matrix[packed(d, i)] = q[i * (r + 1) + r];
  }
  w.matrix[packed(d, d)] = Pair{};
}

// FI and rank of the windows of a group, `used` the lanes that are wanted. column: where the
// group's windows begin in sums and lines; place: in the output. Windows that are left waiting have
// no result yet.
template <int NS>
Solved<Pair> solve_group(const WindowProblem& p, const WindowTile& t, WindowWork& w,
                         const WindowGroup& g, int64_t column, int64_t place, PairMask used) {
  const int64_t r = NS > 0 ? NS : w.metric.r, d = g.pixels(), stride = tile_stride(p);
  const bool own_row = p.objective == static_cast<int>(Objective::kRow), few = d < r;
  Solved<Pair> s = {Pair{}, Pair{}};
  PairMask left = used;
  if (p.rule != Rule::kExact && few)
    pixel_metric(w, g, stride, column);
  else if (!few && (p.rule != Rule::kExact || !own_row))
    add_columns(w.sums, packed_size(p.rule == Rule::kExact ? r : r + 1), stride, column, g.across,
                w.matrix);
  if (p.rule == Rule::kDamped) {
    const double tau = p.tau[t.sample];
    if (!(tau > 0.0)) return s;
    if (few)
      s.fi = damped_window<Pair, 0>(w.matrix, d, DampedForm::kPixels, nullptr, tau);
    else
      s.fi = damped_window<Pair, NS>(w.matrix, r, own_row ? DampedForm::kRow : DampedForm::kClasses,
                                     w.metric.u, tau);
    return s;
  }
  WindowGroup second = g;
  second.x += kLanes;
  if (p.rule == Rule::kTruncated) {
    Pair* scratch = reinterpret_cast<Pair*>(w.scratch);
    left = few ? truncated_window<Pair, 0>(w.matrix, d, p.eps, 1, Pair{} - 1.0, scratch, &s.fi,
                                           &s.rank)
               : truncated_window<Pair, NS>(w.matrix, r, p.eps, 2, Pair{} + w.metric.all, scratch,
                                            &s.fi, &s.rank);
  } else if (!few && !own_row) {
    left = negate(surely_full_rank<Pair, NS>(w.matrix, r, p.tolerance));
    s = {Pair{} + w.closed, Pair{} + static_cast<double>(r)};
  }
  left = left & used;
  if (!any(left)) return s;
  if (p.rule == Rule::kExact && !few) {
    wait_for_solve(p, w, g, column, r + own_row, place, left);
    return s;
  }
  const auto again = [&](const WindowGroup& half, int64_t at, VecI wanted) {
    return p.rule == Rule::kTruncated ? truncated_again(p, t, w, half)
                                      : exact_from_pixels(p, w, half, at, wanted);
  };
  if (any(left.lo)) {
    const Solved<VecD> lo = again(g, column, left.lo);
    s.fi.lo = select(left.lo, lo.fi, s.fi.lo);
    s.rank.lo = select(left.lo, lo.rank, s.rank.lo);
  }
  if (any(left.hi)) {
    const Solved<VecD> hi = again(second, column + kLanes, left.hi);
    s.fi.hi = select(left.hi, hi.fi, s.fi.hi);
    s.rank.hi = select(left.hi, hi.rank, s.rank.hi);
  }
  return s;
}

FASTFI_END
