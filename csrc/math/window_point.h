// A window of one pixel and one channel: G and h are numbers.
#pragma once

#include "../problems.h"
#include "window_metric.h"

FASTFI_BEGIN

// Writes FI and rank. at(k): coordinate k of the pixel: its contrasts for kExact, else its
// coordinates in the metric, and h behind them where the pixel has it.
template <class V, class At>
FASTFI_HD void solve_point(const WindowProblem& p, const WindowMetric& q, double tau, int64_t label,
                           const At& at, V* fi, V* rank) {
  const int64_t r = q.r;
  V square = V{}, h = V{};
  const V one = V{} + 1.0;
  if (p.rule != Rule::kExact) {
    for (int64_t k = 0; k < r; ++k) {
      const V x = at(k);
      square += x * x;
    }
    h = at(r);
    const bool damped = p.rule == Rule::kDamped;
    const V least = V{} + (damped ? (tau > 0.0 ? -1.0 : HUGE_VAL) : p.eps * p.eps);
    const Mask<V> keep = square > least;
    const V size = select(keep, square + (damped ? tau : 0.0), one);
    *fi = select(keep, h * h / size, V{});
    *rank = select(keep, one, V{});
    return;
  }
  // In units of the largest contrast: FI does not depend on them, and a square may underflow.
  V mean = V{}, unit = V{};
  for (int64_t k = 0; k < r; ++k) {
    const V d = abs_of(at(k));
    unit = select(d > unit, d, unit);
  }
  const Mask<V> present = unit > 0.0;
  unit = select(present, unit, one);
  for (int64_t k = 0; k < r; ++k) {
    const V d = at(k) / unit;
    mean += q.prob[k] * d;
    square += q.prob[k] * d * d;
    h += q.slope[k] * d;
  }
  if (p.objective == static_cast<int>(Objective::kRow)) h = at(r) / unit;
  if (p.objective == static_cast<int>(Objective::kCrossEntropy))
    h = label > 0 ? mean - at(label - 1) / unit : mean;
  square -= mean * mean;  // loses at most a factor K: class 0 is the most probable
  const Mask<V> alive = square > 0.0;
  const V root = h / sqrt_of(select(alive, square, one));
  const V beyond = select((abs_of(h) > 0.0) & present, V{} + HUGE_VAL, V{});
  *fi = select(alive, root * root, beyond);
  *rank = select(present, one, V{});
}

FASTFI_END
