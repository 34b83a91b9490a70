#include "solve.h"

namespace fastfi {
namespace gpu {

cudaError_t solve_exact(const SolveProblem& p, double* workspace, cudaStream_t stream) {
  return launch_solve<Rule::kExact>(p, workspace, stream);
}

}  // namespace gpu
}  // namespace fastfi
