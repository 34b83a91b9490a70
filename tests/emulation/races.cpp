// Every kind of kernel on small problems, to be compiled with the emulation and -fsanitize=thread:
// in order is only what a barrier puts in order, however the threads were scheduled.
#include <algorithm>
#include <random>
#include <vector>

#include "cuda/windows.h"

using namespace fastfi;

std::mt19937 source(1);
double draw() { return std::normal_distribution<double>()(source); }

// Two samples, one of each thing that a solve or a window kernel reads; room for its results.
struct Sample {
  static constexpr int64_t kSamples = 2;
  std::vector<double> gram, log_prob, grad, tau, fi;
  std::vector<int64_t> label, rank;
  std::vector<float> rows;

  Sample(int64_t classes, int64_t n, int64_t width)
      : gram(kSamples * n * n),
        log_prob(kSamples * classes),
        grad(kSamples * classes, 0.0),
        tau(kSamples, 0.5),
        fi(kSamples * 8),
        label(kSamples, 1),
        rank(kSamples * 8),
        rows(kSamples * n * 4) {
    std::vector<double> d(n * width);
    for (float& x : rows) x = static_cast<float>(draw());
    for (int64_t s = 0; s < kSamples; ++s) {
      for (double& x : d) x = draw();
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j)
          for (int64_t w = 0; w < width; ++w)
            gram[(s * n + i) * n + j] += d[i * width + w] * d[j * width + w];
      for (int64_t k = 0; k < classes; ++k) log_prob[s * classes + k] = -0.3 * (k + 1);
      grad[s * classes] = 1.0, grad[s * classes + 1] = -1.0;
    }
  }
};

template <Rule R>
void run(int64_t classes, int objective, int64_t width) {
  const int64_t n = objective == 2 ? classes : classes - 1, b = Sample::kSamples;
  Sample q(classes, n, width);
  const SolveProblem p = {R,
                          objective,
                          q.gram.data(),
                          q.log_prob.data(),
                          objective == 0 ? q.label.data() : nullptr,
                          objective == 1 ? q.grad.data() : nullptr,
                          q.tau.data(),
                          1e-12,
                          1e-18,
                          1e-3,
                          b,
                          1,
                          n,
                          classes,
                          q.fi.data(),
                          q.rank.data()};
  std::vector<double> work(solve_doubles(p) + b + 1);
  if (launch_teams<R>(p, nullptr, work.data(), nullptr) != cudaSuccess) abort();
  if (classes <= 4 && objective < 2)
    if (launch_small<R, 3>(p, work.data(), nullptr) != cudaSuccess) abort();

  Windows w = {};
  w.problem = {R,          objective,   q.rows.data(),
               false,      b,           n,
               classes,    1,           1,
               2,          2,           false,
               2,          nullptr,     nullptr,
               p.log_prob, p.label,     p.grad,
               p.tau,      1e-12,       1e-18,
               1e-3,       q.fi.data(), q.rank.data()};
  w.count = 2;
  for (int i = 0; i < 2; ++i) w.radius[i] = w.slot[i] = i;
  work.resize(window_doubles(w.problem) + 1);
  const cudaError_t error = classes <= 4 && objective < 2
                                ? launch_small_windows<R, 3>(w, work.data(), nullptr)
                                : launch_window_teams<R>(w, nullptr, work.data(), nullptr);
  if (error != cudaSuccess) abort();
}

int main() {
  for (const int64_t classes : {4, 11, 19})
    for (int objective = 0; objective < 3; ++objective)
      for (const int64_t width : {int64_t{2}, classes + 2}) {
        run<Rule::kExact>(classes, objective, width);
        run<Rule::kTruncated>(classes, objective, width);
        run<Rule::kDamped>(classes, objective, width);
      }
}
