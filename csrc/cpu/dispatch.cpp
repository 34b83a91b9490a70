#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace fastfi {

extern const KernelTable kTable_portable;
#ifdef FASTFI_X86
extern const KernelTable kTable_avx2;
extern const KernelTable kTable_avx512;
#endif

namespace {

struct Runnable {
  const KernelTable* table[4] = {};
  Runnable() {
    int n = 0;
#ifdef FASTFI_X86
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512) table[n++] = &kTable_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) table[n++] = &kTable_avx2;
#endif
    table[n++] = &kTable_portable;
  }
};

constexpr std::align_val_t kAlign{64};

struct Release {
  void operator()(double* p) const { ::operator delete(p, kAlign); }
};
using Scratch = std::unique_ptr<double, Release>;

using Work = std::function<void(int64_t begin, int64_t end, double* scratch)>;

// What the threads of one call share. A thread that the system starts late finds it closed; it is
// kept alive by whoever still holds it.
struct Shared {
  Work work;
  int64_t units, chunk;
  std::vector<Scratch> scratch;  // one for each thread
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable idle;
  int active = 0;
  bool closed = false;

  void take(int thread) {
    for (int64_t begin; (begin = next.fetch_add(chunk)) < units;)
      work(begin, std::min(begin + chunk, units), scratch[thread].get());
  }

  void join_in(int thread) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (closed) return;
      ++active;
    }
    take(thread);
    std::lock_guard<std::mutex> lock(mutex);
    if (--active == 0) idle.notify_one();
  }
};

// Calls work(begin, end, scratch) over all units. Threads take chunks of units from a counter, so
// that a slow core does not hold up the others; results do not depend on who takes what. Threads
// end with the call or soon after, so that a fork breaks nothing; the caller waits only for those
// that took part: after a parallel region, torch's own threads may spin on the other cores for
// longer than the whole call takes.
void spread(int64_t units, int64_t scratch_doubles, int threads, int64_t grain, Work work) {
  if (units == 0) return;
  const int64_t useful = (units + grain - 1) / grain;
  const int count = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, useful)));
  auto shared = std::make_shared<Shared>();
  shared->work = std::move(work);
  shared->units = units;
  shared->chunk = std::max<int64_t>(1, std::min(grain, units / (4 * count)));
  const std::size_t bytes = static_cast<std::size_t>(scratch_doubles) * sizeof(double);
  for (int t = 0; t < count; ++t)
    shared->scratch.emplace_back(static_cast<double*>(::operator new(bytes, kAlign)));
  for (int t = 1; t < count; ++t) {
    try {
      std::thread([shared, t] { shared->join_in(t); }).detach();
    } catch (const std::exception&) {
      break;  // no more threads, or no memory for one: those that run take all the work
    }
  }
  shared->take(0);
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->closed = true;
  shared->idle.wait(lock, [&] { return shared->active == 0; });
  shared->scratch.clear();  // a late thread must not keep it
}

// A thread costs some 20 microseconds to start, so that each should have about 100000 flops.
int64_t grain_for(double flops_per_unit) {
  return std::max<int64_t>(1, static_cast<int64_t>(1e5 / (flops_per_unit + 1.0)));
}

}  // namespace

const KernelTable* const* runnable_tables() {
  static const Runnable runnable;
  return runnable.table;
}

void run_gram(const KernelTable& table, const GramProblem& p, int threads) {
  const double columns = static_cast<double>(p.columns) / std::max<int64_t>(1, p.segments);
  const double flops = p.count * columns * std::min<int64_t>(p.count, 48) + 50.0;
  spread(table.gram_units(p), table.gram_scratch(p), threads, grain_for(flops),
         [&](int64_t begin, int64_t end, double* s) { table.gram(p, begin, end, s); });
}

void run_solve(const KernelTable& table, const SolveProblem& p, int threads) {
  const double n = static_cast<double>(p.n);
  const double flops = 10.0 * n * n * n + 100.0 * n;
  spread(table.solve_units(p), table.solve_scratch(p), threads, grain_for(flops),
         [&](int64_t begin, int64_t end, double* s) { table.solve(p, begin, end, s); });
}

void run_windows(const KernelTable& table, const WindowProblem& p, int threads) {
  // Wide windows of many classes need much scratch: together at most 64 MiB, or the rows' own size.
  const double pixels = static_cast<double>(p.channels) * p.depth * p.height * p.width;
  const double rows = p.samples * p.n * pixels * (p.is_double ? 8.0 : 4.0);
  const double scratch = 8.0 * static_cast<double>(table.window_scratch(p));
  const double most = std::max(rows, 64.0 * (1 << 20)) / scratch;
  if (most < threads) threads = std::max(1, static_cast<int>(most));
  spread(table.window_units(p), table.window_scratch(p), threads, 1,
         [&](int64_t begin, int64_t end, double* s) { table.windows(p, begin, end, s); });
}

void run_ghost(const KernelTable& table, const GhostProblem& p, int threads) {
  const double outputs = static_cast<double>(p.groups) * p.outputs * p.rows * p.positions;
  const double flops = outputs * (p.positions + 0.5 * p.rows) + 1000.0;
  spread(table.ghost_units(p), table.ghost_scratch(p), threads, grain_for(flops),
         [&](int64_t begin, int64_t end, double* s) { table.ghost(p, begin, end, s); });
}

void run_sums(const KernelTable& table, const SumsProblem& p, int threads) {
  int64_t numbers = 0;
  for (int64_t i = 0; i < p.count; ++i) numbers += p.items[i].channels * p.items[i].positions;
  // A thread for less than a million numbers costs more than it gives (measured).
  const int64_t grain = 1 + (p.count << 20) / (numbers + 1);
  spread(table.sums_units(p), 1, threads, grain,
         [&](int64_t begin, int64_t end, double* s) { table.channel_sums(p, begin, end, s); });
}

}  // namespace fastfi
