// What the instruction-set builds offer to the rest: plain structs of pointers and sizes, and one
// table of functions for each build. No torch, no Python, nothing that throws.
#pragma once

#include "../problems.h"

namespace fastfi {

// rows [batch, count, columns] -> out [batch, segments, count, count]. Segment g of sample b holds
// the columns from offsets[b * offset_stride + g] up to the next; without offsets there is one
// segment, of all columns.
struct GramProblem {
  const void* rows;
  bool is_double;  // else float
  int64_t batch, count, columns;
  double* out;
  const int64_t* offsets = nullptr;
  int64_t segments = 1, offset_stride = 0;
};

// Cotangents d[r] of one layer's outputs, [batch, groups * outputs, positions] for each row r, and
// its input x [batch, groups * channels, pixels], both with strides in elements -> out [batch,
// rows, rows], the inner products of the weight's gradients. Patch t holds the pixels at[t * taps +
// k], -1 where it reaches beyond the border.
struct GhostProblem {
  const void* x;
  bool x_double, d_double;  // else float
  int64_t batch, groups, channels, pixels;
  int64_t x_sample, x_channel, x_pixel;
  const int32_t* at;
  int64_t positions, taps;
  const void* const* d;
  int64_t rows, outputs;
  int64_t d_sample, d_output, d_position;
  double* out;
};

// d and factor [batch, channels, positions] -> 2 * channels columns of the output: sums over
// positions of d * factor, then of d.
struct SumsItem {
  const void* d;
  const void* factor;
  int64_t channels, positions;
  int64_t column;
};

// All of one type, as is out [batch, columns].
struct SumsProblem {
  const SumsItem* items;
  int64_t count, batch;
  bool is_double;  // else float
  void* out;
  int64_t columns;
};

// Work is counted in units that any thread may take: [begin, end) of units(problem).
struct KernelTable {
  const char* name;
  int lanes;
  int64_t (*gram_units)(const GramProblem&);
  int64_t (*gram_scratch)(const GramProblem&);  // doubles, each thread
  void (*gram)(const GramProblem&, int64_t begin, int64_t end, double* scratch);
  int64_t (*solve_units)(const SolveProblem&);
  int64_t (*solve_scratch)(const SolveProblem&);  // doubles, each thread
  void (*solve)(const SolveProblem&, int64_t begin, int64_t end, double* scratch);
  int64_t (*window_units)(const WindowProblem&);
  int64_t (*window_scratch)(const WindowProblem&);  // doubles, each thread
  void (*windows)(const WindowProblem&, int64_t begin, int64_t end, double* scratch);
  int64_t (*ghost_units)(const GhostProblem&);
  int64_t (*ghost_scratch)(const GhostProblem&);  // doubles, each thread
  void (*ghost)(const GhostProblem&, int64_t begin, int64_t end, double* scratch);
  int64_t (*sums_units)(const SumsProblem&);
  void (*channel_sums)(const SumsProblem&, int64_t begin, int64_t end, double* scratch);
};

}  // namespace fastfi
