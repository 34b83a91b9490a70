// What the instruction-set builds offer to the rest: plain structs of pointers and sizes, and one
// table of functions for each build. No torch, no Python, nothing that throws.
#pragma once

#include <stdint.h>

namespace fastfi {

// rows [batch, count, columns] -> out [batch, count, count].
struct GramProblem {
  const void* rows;
  bool is_double;  // else float
  int64_t batch, count, columns;
  double* out;
};

enum class Rule : int { kExact = 0, kTruncated = 1, kDamped = 2 };

// gram [samples * blocks, n, n]; log_prob [samples, classes]; label [samples] or grad [samples,
// classes] or neither, by objective; tau [samples] for kDamped; rank is not written for kDamped.
struct SolveProblem {
  Rule rule;
  int objective;  // enum class Objective
  const double* gram;
  const double* log_prob;
  const int64_t* label;
  const double* grad;
  const double* tau;
  double tolerance;      // relative residual of the rank decision, on the Gram matrix
  double row_tolerance;  // kExact: the same on the rows themselves
  double eps;            // kTruncated
  int64_t samples, blocks, n, classes;
  double* fi;
  int64_t* rank;
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
};

}  // namespace fastfi
