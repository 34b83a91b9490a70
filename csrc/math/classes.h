// What every solve needs of the class probabilities, from their logarithms.
#pragma once

#include "pick.h"
#include "team.h"

FASTFI_BEGIN

// log_prob [k] -> sqrt_p [k]; 0 for an absent class (log_prob = -infinity). Halving is exact, so
// that each square root carries the error of one exponential only.
template <class V, class T = Alone>
FASTFI_HD void class_weights(const V* log_prob, int64_t classes, V* sqrt_p) {
  FASTFI_EACH(T, k, 0, classes) {
    const Mask<V> present = log_prob[k] > -1e300;
    const V half = select(log_prob[k] > kLogProbFloor, log_prob[k], V{} + kLogProbFloor) * 0.5;
    sqrt_p[k] = select(present, exp_of(half), V{});
  }
  T::sync();
}

// The entry of one class, of NS + 1 (of any number where NS is 0).
template <int NS, class V, class I>
FASTFI_HD V of_class(const V* values, I at) {
  return pick<NS == 0 ? 0 : NS + 1>(values, at);
}

// a / sqrt_p, and 0 for an absent class.
template <class V>
FASTFI_HD V over_weight(V a, V sqrt_p) {
  const Mask<V> present = sqrt_p > 0.0;
  return select(present, a / select(present, sqrt_p, V{} + 1.0), V{});
}

FASTFI_END
