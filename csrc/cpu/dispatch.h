// Chooses the widest instruction set that this CPU runs, and spreads work over threads.
#pragma once

#include "kernels.h"

namespace fastfi {

// The builds present in this module that this CPU can run, widest first; ends with nullptr.
const KernelTable* const* runnable_tables();

// Throws std::bad_alloc where a thread's scratch cannot be had, before any result is written.
void run_gram(const KernelTable& table, const GramProblem& problem, int threads);
void run_solve(const KernelTable& table, const SolveProblem& problem, int threads);
void run_windows(const KernelTable& table, const WindowProblem& problem, int threads);
void run_ghost(const KernelTable& table, const GhostProblem& problem, int threads);
void run_sums(const KernelTable& table, const SumsProblem& problem, int threads);

}  // namespace fastfi
