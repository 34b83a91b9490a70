// Names shared by every header: host/device qualifiers and the namespace.
//
// The CPU kernels are compiled once per instruction set. Every build lives in a namespace of its
// own (FASTFI_ISA), so that the linker can never pick an AVX-512 copy of a template for a CPU that
// lacks it. For the same reason these headers use nothing from the standard library that could be
// emitted out of line.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define FASTFI_HD __host__ __device__ __forceinline__
#else
#define FASTFI_HD inline
#endif

// One thread of a GPU runs this code (or the tests' emulation of one).
#if defined(__CUDA_ARCH__) && !defined(FASTFI_DEVICE)
#define FASTFI_DEVICE
#endif

// Arrays of a CUDA thread stay in registers only where every index is known at compile time.
#ifdef __CUDA_ARCH__
#define FASTFI_UNROLL _Pragma("unroll")
#else
#define FASTFI_UNROLL
#endif
// The same for loops of the CPU that GCC should unroll: those over short rows of a packed matrix.
#ifdef __CUDACC__
#define FASTFI_UNROLL_ROW FASTFI_UNROLL
#elif defined(__GNUC__)
#define FASTFI_UNROLL_ROW _Pragma("GCC unroll 16")
#else
#define FASTFI_UNROLL_ROW
#endif

#if defined(__GNUC__) || defined(__CUDACC__)
#define FASTFI_RESTRICT __restrict__
#else
#define FASTFI_RESTRICT
#endif

#ifndef FASTFI_ISA
#define FASTFI_ISA scalar
#endif

#define FASTFI_BEGIN \
  namespace fastfi { \
  inline namespace FASTFI_ISA {
#define FASTFI_END \
  }                \
  }

FASTFI_BEGIN

// Which of the three forms the objective takes; see fastfi/_ops.py.
enum class Objective : int { kCrossEntropy = 0, kGradient = 1, kRow = 2 };

// Probabilities below exp(-1200) are replaced by it: 1 / sqrt(P) stays finite, and FI, which
// overflows float64 from exp(-709) on, does not change.
constexpr double kLogProbFloor = -1200.0;

FASTFI_END
