// What both bindings make of Python's integers.
#pragma once

#include <cstdint>

#include "problems.h"

namespace fastfi {

// A pointer, from tensor.data_ptr().
template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A SolveProblem or WindowProblem, with the arguments that they have in common.
template <class Problem>
Problem with_objective(int rule, std::uintptr_t log_prob, std::uintptr_t label, std::uintptr_t grad,
                       std::uintptr_t tau, double tolerance, double row_tolerance, double eps,
                       int64_t classes, std::uintptr_t fi, std::uintptr_t rank) {
  Problem p = {};
  p.rule = static_cast<Rule>(rule);
  p.objective = label ? 0 : grad ? 1 : 2;
  p.log_prob = at<const double>(log_prob);
  p.label = at<const int64_t>(label);
  p.grad = at<const double>(grad);
  p.tau = at<const double>(tau);
  p.tolerance = tolerance;
  p.row_tolerance = row_tolerance;
  p.eps = eps;
  p.classes = classes;
  p.fi = at<double>(fi);
  p.rank = at<int64_t>(rank);
  return p;
}

}  // namespace fastfi
