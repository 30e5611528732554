// Compiles one loop for every instruction set and picks the compiled copy at run time.
//
// A kernel is a struct whose operator() is MLSYS_INLINE. Each run_* function below inlines that body and
// compiles it for its own target, so the auto-vectoriser writes three versions of one source. See cpu.h for
// why all give the same bits, and docs/notes/0004-simd-dispatch.md for why attributes and not one library per
// instruction set.
#pragma once

#include "core/cpu.h"

namespace mlsys {

template <class Kernel, class... Args>
void run_scalar(const Kernel& kernel, Args... args) {
  kernel(args...);
}

#if MLSYS_HAS_X86_LEVELS
template <class Kernel, class... Args>
MLSYS_TARGET_AVX2 void run_avx2(const Kernel& kernel, Args... args) {
  kernel(args...);
}

template <class Kernel, class... Args>
MLSYS_TARGET_AVX512 void run_avx512(const Kernel& kernel, Args... args) {
  kernel(args...);
}
#endif

// Runs kernel(args...) with the best instruction set of this process. The call costs one predictable branch:
// give it at least a few hundred elements of work.
template <class Kernel, class... Args>
void run_simd(SimdLevel level, const Kernel& kernel, Args... args) {
#if MLSYS_HAS_X86_LEVELS
  if (level == SimdLevel::kAvx512) return run_avx512(kernel, args...);
  if (level == SimdLevel::kAvx2) return run_avx2(kernel, args...);
#endif
  run_scalar(kernel, args...);
}

}  // namespace mlsys
