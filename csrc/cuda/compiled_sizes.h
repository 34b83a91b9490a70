// How many contrasts the kernels for one thread are compiled for. A problem takes the next larger
// size, with absent classes in the places that are too many.
#pragma once

#include "../math/config.h"
#include "runtime.h"

FASTFI_BEGIN

constexpr int64_t kMostContrasts = 9;

template <int N>
struct Contrasts {
  static constexpr int value = N;
};

// Calls launch with the Contrasts that hold r of them.
template <class Launch>
cudaError_t with_contrasts(int64_t r, const Launch& launch) {
  if (r <= 1) return launch(Contrasts<1>{});
  if (r <= 3) return launch(Contrasts<3>{});
  if (r <= 6) return launch(Contrasts<6>{});
  return launch(Contrasts<kMostContrasts>{});
}

// Whether one thread can solve a problem of an objective in terms of the classes.
inline bool for_threads(int objective, int64_t classes) {
  return objective != static_cast<int>(Objective::kRow) && classes - 1 <= kMostContrasts;
}

FASTFI_END
