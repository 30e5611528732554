// Which instruction set the kernels of this process use, chosen once at run time.
//
// One build serves every x86-64 machine: each hot loop is compiled three times by the MLSYS_TARGET_* function
// attributes below (scalar baseline, AVX2, AVX-512) and picked through simd_level(). On other architectures
// only the baseline exists. All levels compute with the same IEEE operations in the same order per element
// (-ffp-contract=off), so they give the same bits.
#pragma once

namespace mlsys {

enum class SimdLevel : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// The highest level this CPU supports, lowered by MLSYS_SIMD=scalar|avx2|avx512 when that is set.
// Throws std::invalid_argument when MLSYS_SIMD names no level or one the CPU lacks.
SimdLevel simd_level();

const char* name_of(SimdLevel level);

// Whether streaming loops should ask for cache lines ahead. Measured on an AdamW step over 50M parameters:
// 10% faster with software prefetch on an Intel Xeon, 13% slower on an AMD EPYC (Zen 4), whose own prefetcher
// already reaches the memory's limit. So: Intel only, unless MLSYS_PREFETCH=0|1 says otherwise. Never changes
// a result.
bool prefetch_pays();

}  // namespace mlsys

#if defined(__x86_64__)
#define MLSYS_HAS_X86_LEVELS 1
#define MLSYS_TARGET_AVX2 __attribute__((target("avx2,f16c,fma")))
#if defined(__clang__)
#define MLSYS_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")))
#else
#define MLSYS_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma,prefer-vector-width=512")))
#endif
#else
#define MLSYS_HAS_X86_LEVELS 0
#endif

// Force-inlined bodies take the target of the function that calls them: write the loop once with this, then
// call it from one function per level.
#define MLSYS_INLINE inline __attribute__((always_inline))
