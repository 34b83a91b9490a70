// Compiled once for each instruction set, with FASTFI_ISA naming the namespace (see setup.py).
#include "channel_sums.h"
#include "ghost.h"
#include "gram_tiles.h"
#include "solve_lanes.h"
#include "windows.h"

#define FASTFI_NAME_(x) #x
#define FASTFI_NAME(x) FASTFI_NAME_(x)
#define FASTFI_JOIN_(a, b) a##b
#define FASTFI_JOIN(a, b) FASTFI_JOIN_(a, b)

namespace fastfi {

extern const KernelTable FASTFI_JOIN(kTable_, FASTFI_ISA);
const KernelTable FASTFI_JOIN(kTable_, FASTFI_ISA) = {
    FASTFI_NAME(FASTFI_ISA),         FASTFI_ISA::kLanes,  FASTFI_ISA::gram_units,
    FASTFI_ISA::gram_scratch,        FASTFI_ISA::gram,    FASTFI_ISA::solve_units,
    FASTFI_ISA::solve_scratch,       FASTFI_ISA::solve,   FASTFI_ISA::window_units,
    FASTFI_ISA::window_tile_scratch, FASTFI_ISA::windows, FASTFI_ISA::ghost_units,
    FASTFI_ISA::ghost_scratch,       FASTFI_ISA::ghost,   FASTFI_ISA::sums_units,
    FASTFI_ISA::channel_sums,
};

}  // namespace fastfi
