// Blocks and warps of CUDA on one CPU thread, so that the kernels' own sources run in tests without
// a GPU: included before them (g++ -include), with FASTFI_EMULATED defined.
//
// Each thread of a block is a fiber that runs until it has to wait. The order in which waiting
// fibers go on is the test's choice (FASTFI_EMULATED_ORDER: 0 forwards, 1 backwards, else the seed
// of a random order): a result that depends on it has a race. Shared memory begins as NaN, ends in
// a guard, and is as large as the kernel was allowed; a barrier that not all reach is an error, as
// it hangs a GPU. An error stays until it is asked for, whichever call failed. Compiled with
// -fsanitize=thread, races are found in any order: barriers order memory, shuffles do not.
#pragma once

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <map>
#include <mutex>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define EMULATION __attribute__((no_sanitize("thread"))) inline
#else
#define EMULATION inline
#endif

#define FASTFI_EMULATED
#define FASTFI_DEVICE
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(threads)

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
typedef void* cudaStream_t;

struct Coordinate {
  unsigned x;
};
inline Coordinate threadIdx, blockIdx, gridDim;

namespace emulation {

constexpr int kDevices = 2, kMostThreads = 1024;
constexpr size_t kStack = 256 << 10, kGuard = 64;

// Shared memory of a block: of compute capability 9.0 unless the test says otherwise.
inline int most_shared() {
  const char* setting = getenv("FASTFI_EMULATED_SHARED");
  return setting ? atoi(setting) : 227 << 10;
}

// Blocks that a launch of teams has at most: few, so that teams take several problems.
inline int64_t most_blocks(int64_t on_a_gpu) {
  const char* setting = getenv("FASTFI_EMULATED_BLOCKS");  // "gpu": as many as there
  return setting && !strcmp(setting, "gpu") ? on_a_gpu : 2;
}

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

// What the thread sanitizer is told. Only what is released before and acquired after is in order.
#ifdef __SANITIZE_THREAD__
EMULATION void* this_fiber() { return __tsan_get_current_fiber(); }
EMULATION void* new_fiber() { return __tsan_create_fiber(0); }
EMULATION void enter(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }
EMULATION void release(void* at) { __tsan_release(at); }
EMULATION void acquire(void* at) { __tsan_acquire(at); }
#else
inline void* this_fiber() { return nullptr; }
inline void* new_fiber() { return nullptr; }
inline void enter(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
#endif

struct Fiber {
  jmp_buf state;
  void* sanitized = nullptr;
  std::vector<char> stack;
  const Barrier* waits = nullptr;
  unsigned generation = 0;
  bool started = false, finished = true;
};

struct Machine {
  std::mutex mutex;
  int device = 0;
  cudaError_t error = cudaSuccess;
  std::vector<Fiber> fibers{kMostThreads};
  int threads = 0, current = 0, last_launch_device = 0;
  jmp_buf scheduler;
  void* sanitized = nullptr;  // the scheduler
  ucontext_t start, back;
  std::function<void()> body;
  Barrier block;
  Barrier lanes[kMostThreads / 32][32];
  uint64_t exchange[kMostThreads];
  std::vector<double> shared;
  std::map<const void*, int> allowed;  // kernels that may have more than 48 KiB of it
  uint64_t random = 0;
};
inline Machine machine;

inline cudaError_t recorded(cudaError_t error) {
  if (error != cudaSuccess) machine.error = error;
  return error;
}

inline void fail(const char* what) {
  fprintf(stderr, "emulated block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  machine.error = cudaErrorLaunchFailure;
}

EMULATION void back_to_scheduler() {
  enter(machine.sanitized);
  _longjmp(machine.scheduler, 1);
}

// Each fiber lives as long as the process and runs one thread of block after block.
EMULATION void fiber_main() {
  const int own = machine.current;
  for (;;) {
    acquire(&machine.body);
    machine.body();
    release(&machine.body);
    machine.fibers[own].finished = true;
    if (_setjmp(machine.fibers[own].state) == 0) back_to_scheduler();
  }
}

EMULATION void wait(Barrier& barrier, int expected) {
  if (++barrier.arrived >= expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fiber& fiber = machine.fibers[machine.current];
  fiber.waits = &barrier;
  fiber.generation = barrier.generation;
  if (_setjmp(fiber.state) == 0) back_to_scheduler();
  fiber.waits = nullptr;
}

EMULATION void resume(int thread) {
  Fiber& fiber = machine.fibers[thread];
  machine.current = thread;
  threadIdx.x = static_cast<unsigned>(thread);
  if (_setjmp(machine.scheduler) != 0) return;
  if (!fiber.sanitized) fiber.sanitized = new_fiber();
  machine.sanitized = this_fiber();
  enter(fiber.sanitized);
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  fiber.stack.resize(kStack);
  getcontext(&machine.start);
  machine.start.uc_stack.ss_sp = fiber.stack.data();
  machine.start.uc_stack.ss_size = kStack;
  machine.start.uc_link = nullptr;
  makecontext(&machine.start, fiber_main, 0);
  swapcontext(&machine.back, &machine.start);
}

// The next thread that can go on, after `from`; -1 if there is none.
EMULATION int next_thread(int from, int order) {
  for (int i = 0; i < machine.threads; ++i) {
    const int step = order == 1 ? machine.threads - 1 - i : i;
    const int thread = (from + step) % machine.threads;
    const Fiber& fiber = machine.fibers[thread];
    const bool waiting = fiber.waits && fiber.waits->generation == fiber.generation;
    if (!fiber.finished && !waiting) return thread;
  }
  return -1;
}

EMULATION void run_block(int order) {
  release(&machine.body);
  for (int t = 0; t < machine.threads; ++t) {
    machine.fibers[t].finished = false;
    machine.fibers[t].waits = nullptr;
  }
  machine.block = Barrier{};
  memset(static_cast<void*>(machine.lanes), 0, sizeof(machine.lanes));
  int at = 0;
  for (;;) {
    if (order > 1) {
      machine.random = machine.random * 6364136223846793005u + 1442695040888963407u;
      at = static_cast<int>((machine.random >> 33) % static_cast<unsigned>(machine.threads));
    }
    const int thread = next_thread(at, order);
    if (thread < 0) break;
    resume(thread);
    at = thread;
  }
  acquire(&machine.body);
  for (int t = 0; t < machine.threads; ++t)
    if (!machine.fibers[t].finished) {
      fail("a barrier that not all threads reach");
      for (Fiber& fiber : machine.fibers) fiber.started = false;  // their stacks are in use
      return;
    }
}

inline void run(int64_t blocks, int threads, int64_t shared_bytes, std::function<void()> body) {
  if (threads < 1 || threads > kMostThreads || threads % 32 || shared_bytes > most_shared()) {
    machine.error = cudaErrorInvalidConfiguration;
    return;
  }
  const char* setting = getenv("FASTFI_EMULATED_ORDER");
  const int order = setting ? atoi(setting) : 0;
  machine.random = static_cast<uint64_t>(order);
  machine.body = std::move(body);
  machine.threads = threads;
  machine.last_launch_device = machine.device;
  gridDim.x = static_cast<unsigned>(blocks);
  const size_t doubles = static_cast<size_t>(shared_bytes + 7) / 8;
  for (int64_t b = 0; b < blocks && machine.error == cudaSuccess; ++b) {
    blockIdx.x = static_cast<unsigned>(b);
    machine.shared.assign(doubles + kGuard, __builtin_nan(""));
    for (size_t i = 0; i < kGuard; ++i) machine.shared[doubles + i] = -12345.0;
    run_block(order);
    for (size_t i = 0; i < kGuard; ++i)
      if (machine.shared[doubles + i] != -12345.0) return fail("writes beyond its shared memory");
  }
}

}  // namespace emulation

namespace fastfi {
namespace gpu {

inline double* emulated_shared() { return emulation::machine.shared.data(); }

template <class Arguments>
void emulate(void (*kernel)(Arguments), int64_t blocks, int threads, int64_t shared_bytes,
             const Arguments& arguments) {
  const std::lock_guard<std::mutex> lock(emulation::machine.mutex);
  auto& allowed = emulation::machine.allowed[reinterpret_cast<const void*>(kernel)];
  if (shared_bytes > (allowed > 48 << 10 ? allowed : 48 << 10)) {
    (void)emulation::recorded(cudaErrorInvalidValue);
    return;
  }
  emulation::run(blocks, threads, shared_bytes, [&] { kernel(arguments); });
}

}  // namespace gpu
}  // namespace fastfi

EMULATION void __syncthreads() {
  emulation::release(&emulation::machine.block);
  emulation::wait(emulation::machine.block, emulation::machine.threads);
  emulation::acquire(&emulation::machine.block);
}

namespace emulation {

// Where the lanes of a mask meet.
EMULATION Barrier& meet(unsigned mask) {
  const unsigned own = threadIdx.x;
  if (!(mask >> (own % 32) & 1u)) fail("is not in its own mask");
  return machine.lanes[own / 32][__builtin_ctz(mask)];
}

}  // namespace emulation

EMULATION void __syncwarp(unsigned mask) {
  emulation::Barrier& barrier = emulation::meet(mask);
  emulation::release(&barrier);
  emulation::wait(barrier, __builtin_popcount(mask));
  emulation::acquire(&barrier);
}

template <class T>
EMULATION T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  static_assert(sizeof(T) == 8, "the kernels exchange doubles and 64-bit integers");
  const unsigned own = threadIdx.x, other = own ^ static_cast<unsigned>(lanes);
  if (!(mask >> (other % 32) & 1u)) emulation::fail("asks a lane outside its mask");
  emulation::Barrier& barrier = emulation::meet(mask);
  __builtin_memcpy(&emulation::machine.exchange[own], &value, 8);
  emulation::wait(barrier, __builtin_popcount(mask));
  __builtin_memcpy(&value, &emulation::machine.exchange[other], 8);
  emulation::wait(barrier, __builtin_popcount(mask));
  return value;
}

template <class T>
EMULATION T atomicAdd(T* at, T more) {
  const T before = *at;
  *at = before + more;
  return before;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::machine.device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulation::kDevices)
    return emulation::recorded(cudaErrorInvalidDevice);
  emulation::machine.device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::most_shared();
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulation::most_shared()) return emulation::recorded(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(emulation::machine.mutex);
  emulation::machine.allowed[kernel] = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  memset(at, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::machine.error;
  emulation::machine.error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    default:
      return "invalid argument";
  }
}
