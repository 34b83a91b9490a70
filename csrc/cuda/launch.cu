#include "launch.h"
#include "solve.h"
#include "windows.h"

namespace fastfi {
namespace gpu {
namespace {

// The device of a call is the current one while it lasts.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : error(cudaGetDevice(&before_)) {
    if (error == cudaSuccess && before_ != device) {
      error = cudaSetDevice(device);
      changed_ = error == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);  // a device that was current a moment ago
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

const char* message(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  (void)cudaGetLastError();  // reported now: the next launch must not find it again
  return cudaGetErrorString(error);
}

}  // namespace

int64_t solve_workspace(const SolveProblem& p) { return solve_doubles(p); }
int64_t window_workspace(const WindowProblem& p) { return window_doubles(p); }

const char* run_solve(const SolveProblem& p, const Context& c) {
  const DeviceGuard guard(c.device);
  if (guard.error != cudaSuccess) return message(guard.error);
  const auto run = p.rule == Rule::kExact       ? solve_exact
                   : p.rule == Rule::kTruncated ? solve_truncated
                                                : solve_damped;
  return message(run(p, c.workspace, static_cast<cudaStream_t>(c.stream)));
}

const char* run_windows(const WindowProblem& p, const Context& c) {
  const DeviceGuard guard(c.device);
  if (guard.error != cudaSuccess) return message(guard.error);
  const auto run = p.rule == Rule::kExact       ? windows_exact
                   : p.rule == Rule::kTruncated ? windows_truncated
                                                : windows_damped;
  return message(run(p, c.workspace, static_cast<cudaStream_t>(c.stream)));
}

}  // namespace gpu
}  // namespace fastfi
