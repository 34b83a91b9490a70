// Two lane groups as one value, so that the latency of one's divisions and square roots is filled
// with the other's work. The compiler's own wider vectors fall back to scalar code for selections.
#pragma once

#include "lanes.h"

FASTFI_BEGIN

struct PairMask {
  VecI lo, hi;
};

struct Pair {
  VecD lo, hi;
};

template <>
struct Traits<Pair> {
  using Mask = PairMask;
  static constexpr int kLanes = 2 * FASTFI_ISA::kLanes;
};

#define FASTFI_PAIR_ARITHMETIC(op)                                                 \
  inline Pair operator op(Pair a, Pair b) { return {a.lo op b.lo, a.hi op b.hi}; } \
  inline Pair operator op(Pair a, double b) { return {a.lo op b, a.hi op b}; }     \
  inline Pair operator op(double a, Pair b) { return {a op b.lo, a op b.hi}; }     \
  inline Pair& operator op## = (Pair & a, Pair b) { return a = a op b; }           \
  inline Pair& operator op## = (Pair & a, double b) { return a = a op b; }
#define FASTFI_PAIR_COMPARISON(op)                                                     \
  inline PairMask operator op(Pair a, Pair b) { return {a.lo op b.lo, a.hi op b.hi}; } \
  inline PairMask operator op(Pair a, double b) { return {a.lo op b, a.hi op b}; }

FASTFI_PAIR_ARITHMETIC(+)
FASTFI_PAIR_ARITHMETIC(-)
FASTFI_PAIR_ARITHMETIC(*)
FASTFI_PAIR_ARITHMETIC(/)
FASTFI_PAIR_COMPARISON(>)
FASTFI_PAIR_COMPARISON(>=)
FASTFI_PAIR_COMPARISON(<)
FASTFI_PAIR_COMPARISON(<=)
#undef FASTFI_PAIR_ARITHMETIC
#undef FASTFI_PAIR_COMPARISON

inline Pair operator-(Pair a) { return {-a.lo, -a.hi}; }
inline PairMask operator&(PairMask a, PairMask b) { return {a.lo & b.lo, a.hi & b.hi}; }
inline PairMask operator|(PairMask a, PairMask b) { return {a.lo | b.lo, a.hi | b.hi}; }
inline PairMask negate(PairMask m) { return {~m.lo, ~m.hi}; }
inline bool any(PairMask m) { return any(m.lo | m.hi); }
inline Pair select(PairMask m, Pair a, Pair b) {
  return {select(m.lo, a.lo, b.lo), select(m.hi, a.hi, b.hi)};
}
inline Pair sqrt_of(Pair x) { return {sqrt_of(x.lo), sqrt_of(x.hi)}; }
inline Pair inv_sqrt_of(Pair x) { return {inv_sqrt_of(x.lo), inv_sqrt_of(x.hi)}; }
inline Pair abs_of(Pair x) { return {abs_of(x.lo), abs_of(x.hi)}; }

FASTFI_END
