// What the kernels need of CUDA's runtime: shared memory, launches, errors.
#pragma once

// The tests compile these sources for the CPU, with an emulation of blocks and warps in its place.
#ifndef FASTFI_EMULATED
#include <cuda_runtime.h>
#endif

#include <stdint.h>

namespace fastfi {
namespace gpu {

// The block's dynamic shared memory, as doubles.
#ifndef FASTFI_EMULATED
#define FASTFI_SHARED(name) extern __shared__ double name[]
#else
#define FASTFI_SHARED(name) double* name = fastfi::gpu::emulated_shared()
#endif

// Shared memory that a block has without asking for more.
constexpr int64_t kSharedByDefault = 48 << 10;

// Shared memory that a block of the current device can have; what all have where that is not known.
inline int64_t most_shared() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess) {
    (void)cudaGetLastError();  // else the next launch would report it
    return kSharedByDefault;
  }
  return bytes;
}

// Blocks of teams that go through a list or all problems: many more than run at once. In the
// emulation few, so that teams take several problems there too.
#ifndef FASTFI_EMULATED
inline int64_t most_blocks(int64_t on_a_gpu) { return on_a_gpu; }
#else
inline int64_t most_blocks(int64_t on_a_gpu) { return emulation::most_blocks(on_a_gpu); }
#endif

// One launch on a stream, and its error.
template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, int threads, int64_t shared_bytes,
                   cudaStream_t stream, const Arguments& arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > kSharedByDefault) {
    // As much as there is, whatever this launch takes: the setting is the kernel's, and another
    // thread that sets less in between would make the launch fail.
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(most_shared()));
    if (error != cudaSuccess) return error;
  }
#ifndef FASTFI_EMULATED
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared_bytes), stream>>>(
      arguments);
#else
  (void)stream;  // everything is done when this returns
  emulate(kernel, blocks, threads, shared_bytes, arguments);
#endif
  return cudaGetLastError();
}

inline __host__ __device__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline __host__ __device__ int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace gpu
}  // namespace fastfi
