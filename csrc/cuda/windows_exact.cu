#include "windows.h"

namespace fastfi {
namespace gpu {

cudaError_t windows_exact(const WindowProblem& p, double* workspace, cudaStream_t stream) {
  return launch_windows<Rule::kExact>(p, workspace, stream);
}

}  // namespace gpu
}  // namespace fastfi
