// What every solve needs of the class probabilities, from their logarithms.
#pragma once

#include "scalar.h"

FASTFI_BEGIN

// log_prob [k] -> sqrt_p [k], inv_sqrt_p [k]; an absent class (log_prob = -infinity) has 0 in both.
// Halving is exact, so each square root carries the error of one exponential only.
template <class V>
FASTFI_HD void class_weights(const V* log_prob, int64_t classes, V* sqrt_p, V* inv_sqrt_p) {
  for (int64_t k = 0; k < classes; ++k) {
    const Mask<V> present = log_prob[k] > -1e300;
    const V half = select(log_prob[k] > kLogProbFloor, log_prob[k], V{} + kLogProbFloor) * 0.5;
    sqrt_p[k] = select(present, exp_of(half), V{});
    inv_sqrt_p[k] = select(present, exp_of(-half), V{});
  }
}

FASTFI_END
