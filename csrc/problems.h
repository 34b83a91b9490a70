// What the solves and the window kernels are given, on the CPU and on a GPU: pointers and sizes.
#pragma once

#include <stdint.h>

namespace fastfi {

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

// rows [samples, n, channels, depth, height, width] -> fi and rank [samples, scales, channels,
// depth, height, width], or without the channels where they are joint. Scale s has the windows of 2
// * radius[s] + 1 pixels along each side, clipped at the border; radius increases, and slot[s] is
// the scale's place in the output. The rest as in SolveProblem; rank may be null.
struct WindowProblem {
  Rule rule;
  int objective;
  const void* rows;
  bool is_double;
  int64_t samples, n, classes, channels, depth, height, width;
  bool joint;
  int64_t scales;
  const int64_t* radius;
  const int64_t* slot;
  const double* log_prob;
  const int64_t* label;
  const double* grad;
  const double* tau;
  double tolerance, row_tolerance, eps;
  double* fi;
  int64_t* rank;
};

}  // namespace fastfi
