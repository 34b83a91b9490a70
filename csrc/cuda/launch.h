// What the binding calls. Nothing here waits, allocates device memory or prints: an error comes
// back as a message, null if there is none.
#pragma once

#include "../problems.h"

namespace fastfi {
namespace gpu {

// A device, a stream of it, and memory there to work in (see solve_workspace, window_workspace).
struct Context {
  int device;
  void* stream;
  double* workspace;
};

// Doubles of device memory that a call works in.
int64_t solve_workspace(const SolveProblem& p);
int64_t window_workspace(const WindowProblem& p);

// All pointers are the device's, but for WindowProblem's radius and slot. A label outside the
// classes gives NaN and rank 0: to refuse it, one would have to wait for the device.
const char* run_solve(const SolveProblem& p, const Context& context);
const char* run_windows(const WindowProblem& p, const Context& context);

}  // namespace gpu
}  // namespace fastfi
