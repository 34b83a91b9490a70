// kLanes independent problems side by side, on the compiler's vector extension (GCC, Clang).
//
// Element i of an array of V holds element i of every problem. Control flow is shared, choices are
// masks, and no operation mixes lanes: a problem's result does not depend on its neighbours.
#pragma once

#include "scalar.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

FASTFI_BEGIN

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif

typedef double VecD __attribute__((vector_size(kLanes * 8), aligned(kLanes * 8)));
typedef int64_t VecI __attribute__((vector_size(kLanes * 8), aligned(kLanes * 8)));

template <>
struct Traits<VecD> {
  using Mask = VecI;  // all bits set, or none
  using Index = VecI;
  static constexpr int kLanes = FASTFI_ISA::kLanes;
};

inline VecD select(VecI m, VecD a, VecD b) { return m ? a : b; }
inline VecI select(VecI m, VecI a, VecI b) { return m ? a : b; }

inline bool any(VecI m) {
  int64_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= m[l];
  return bits != 0;
}

inline VecD sqrt_of(VecD x) {
#if defined(__AVX512F__)
  // The zero-masking forms: GCC's plain ones warn of an uninitialised operand.
  return (VecD)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif defined(__AVX2__)
  return (VecD)_mm256_sqrt_pd((__m256d)x);
#else
  VecD y;
  for (int l = 0; l < kLanes; ++l) y[l] = __builtin_sqrt(x[l]);
  return y;
#endif
}

// 1 / sqrt(x) for x between 1e-290 and 1e290, within 2 units in the last place.
inline VecD inv_sqrt_of(VecD x) {
#if defined(__AVX512F__)
  // The hardware's 14 bits, doubled twice by Newton's method: some five times as fast as a square
  // root and a division.
  VecD y = (VecD)_mm512_maskz_rsqrt14_pd(0xff, (__m512d)x);
  for (int i = 0; i < 2; ++i) y = y + y * (0.5 - (0.5 * x) * (y * y));
  return y;
#else
  return 1.0 / sqrt_of(x);
#endif
}

inline VecD abs_of(VecD x) { return (VecD)((VecI)x & INT64_MAX); }
inline VecI negate(VecI m) { return ~m; }

// base[at[l]] of lane l.
inline VecD gather(const VecD* base, VecI at) {
  const double* p = reinterpret_cast<const double*>(base);
#if defined(__AVX512F__)
  const VecI lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return (VecD)_mm512_mask_i64gather_pd(_mm512_setzero_pd(), 0xff, (__m512i)(at * kLanes + lane), p,
                                        8);
#else
  VecD y;
  for (int l = 0; l < kLanes; ++l) y[l] = p[at[l] * kLanes + l];
  return y;
#endif
}

inline VecD to_value(VecI i) { return __builtin_convertvector(i, VecD); }

inline VecD rough_log2(VecD x) { return to_value((VecI)x) * 0x1p-52 - 1023.0; }

// exp(x) for |x| <= 700, within 2 units in the last place: 2^n times a Taylor polynomial on
// [-ln 2 / 2, ln 2 / 2], whose remainder there is below 5e-18.
inline VecD exp_of(VecD x) {
  const VecD magic = VecD{} + 0x1.8p52;  // adding it rounds to an integer, held in the low bits
  const VecD shifted = x * 0x1.71547652b82fep0 + magic;
  const VecD n = shifted - magic;
  const VecD r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  VecD y = VecD{} + 1.0 / 6227020800.0;
  const double c[] = {1.0 / 479001600.0,
                      1.0 / 39916800.0,
                      1.0 / 3628800.0,
                      1.0 / 362880.0,
                      1.0 / 40320.0,
                      1.0 / 5040.0,
                      1.0 / 720.0,
                      1.0 / 120.0,
                      1.0 / 24.0,
                      1.0 / 6.0,
                      0.5,
                      1.0,
                      1.0};
  for (int i = 0; i < 13; ++i) y = y * r + c[i];
  const VecI power = ((VecI)shifted + 1023) << 52;
  return y * (VecD)power;
}

FASTFI_END
