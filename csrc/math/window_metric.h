// What all windows of one sample share: the linear map that turns a pixel's contrasts d [r] into
// coordinates q [r] in which the metric of any set of pixels is sum q q^T, and the objective's
// gradient at a pixel, h = sum_k slope_k d_k.
//
// Damped: q = W^T d with S = W W^T as in damped.h. Truncated: the authors' L0_k = w_k dl_k, w_k =
// P_k / (sqrt(P_k) + eps), is orthogonal to n_k = sqrt(P_k) + eps; a reflection that takes n to the
// reference class leaves r coordinates with the same singular values. Both have the form
// q_k = scale_k d_k - centre_k m, m = sum_k P_k d_k.
#pragma once

#include "classes.h"

FASTFI_BEGIN

struct WindowMetric {
  int64_t r;  // contrasts up to the last present class, or the label
  double* prob;
  double* slope;
  double* scale;
  double* centre;
  double* u;  // kDamped with an objective in terms of the classes: h = Q^T u
  double
      all;  // kTruncated: FI where every singular value is kept; negative where that is not known
};

FASTFI_HD int64_t window_metric_doubles(int64_t classes) { return 8 * classes; }

// The pointers into the memory of a metric, which begins with sqrt_p [classes].
FASTFI_HD void place_metric(double* memory, int64_t classes, WindowMetric* m) {
  m->prob = memory + 2 * classes;
  m->slope = m->prob + classes;
  m->scale = m->slope + classes;
  m->centre = m->scale + classes;
  m->u = m->centre + classes;
}

// Fills `m` and the memory its pointers are made from; log_prob [classes], grad [classes].
template <bool Damped>
FASTFI_HD void window_metric(const double* log_prob, int64_t classes, int64_t label,
                             const double* grad, Objective kind, double eps, double* memory,
                             WindowMetric* m) {
  double* sqrt_p = memory;
  double* normal = sqrt_p + classes;
  place_metric(memory, classes, m);
  double* share = m->u + classes;
  class_weights(log_prob, classes, sqrt_p);
  m->r = classes - 1;
  while (m->r > 1 && m->r > label && !(sqrt_p[m->r] > 0.0)) --m->r;

  const double top = sqrt_p[0], beta = 1.0 / (1.0 + top);
  double length = 0.0, sum = 0.0;
  for (int64_t k = 0; k <= m->r; ++k) {
    normal[k] = sqrt_p[k] > 0.0 ? sqrt_p[k] + eps : 0.0;
    length += normal[k] * normal[k];
    if (kind == Objective::kGradient && k > 0) sum += grad[k];
  }
  length = sqrt_of(length);
  const double first = top * top / (top + eps);
  const double p_y = kind == Objective::kCrossEntropy ? sqrt_p[label] * sqrt_p[label] : 0.0;
  const double factor = Damped ? 1.0 : p_y / (p_y + eps);
  for (int64_t k = 0; k < m->r; ++k) {
    const double p = sqrt_p[k + 1];
    const bool hit = label == k + 1;
    m->prob[k] = p * p;
    if (kind == Objective::kCrossEntropy)
      m->slope[k] = factor * (p * p - (hit ? 1.0 : 0.0));
    else
      m->slope[k] = kind == Objective::kGradient ? grad[k + 1] : 0.0;
    if (Damped) {
      m->scale[k] = p;
      m->centre[k] = beta * p;
      if (kind == Objective::kCrossEntropy)
        m->u[k] = label == 0 ? p / top : beta * p - (hit ? over_weight(1.0, p) : 0.0);
      else
        m->u[k] =
            kind == Objective::kGradient ? over_weight(grad[k + 1], p) + sum * beta / top * p : 0.0;
    } else {
      const double w = p > 0.0 ? p * p / (p + eps) : 0.0;
      m->scale[k] = w;
      m->centre[k] = w - normal[k + 1] / (length + normal[0]) * first;
    }
  }
  if (Damped) return;
  // h = sum b_k L0_k, b_k = g_k / w_k; at full rank FI is the square of b's part off the normal.
  m->all = 0.0;
  if (kind == Objective::kCrossEntropy) {
    const double p = sqrt_p[label];
    for (int64_t k = 0; k <= m->r; ++k)
      if (k != label) m->all += normal[k] / length * (normal[k] / length);
    m->all *= (p + eps) / (p * p + eps) * ((p + eps) / (p * p + eps));
  } else if (kind == Objective::kGradient) {
    double along = 0.0;
    for (int64_t k = 0; k <= m->r; ++k) {
      const double p = sqrt_p[k], w = p > 0.0 ? p * p / (p + eps) : 0.0;
      const double g = k > 0 ? grad[k] : -sum;
      share[k] = g == 0.0 ? 0.0 : g / w;  // infinite for an absent class
      along += share[k] * normal[k] / length;
    }
    for (int64_t k = 0; k <= m->r; ++k) {
      const double rest = share[k] - along * normal[k] / length;
      m->all += rest * rest;
    }
  }
  if (kind == Objective::kRow || !(m->all < 1e300)) m->all = -1.0;
}

FASTFI_END
