#include "solve.h"

namespace fastfi {
namespace gpu {

cudaError_t solve_damped(const SolveProblem& p, double* workspace, cudaStream_t stream) {
  return launch_solve<Rule::kDamped>(p, workspace, stream);
}

}  // namespace gpu
}  // namespace fastfi
