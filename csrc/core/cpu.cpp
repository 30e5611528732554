#include "core/cpu.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mlsys {
namespace {

SimdLevel detect() {
#if MLSYS_HAS_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return SimdLevel::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return SimdLevel::kAvx2;
#endif
  return SimdLevel::kScalar;
}

SimdLevel choose() {
  const SimdLevel best = detect();
  const char* wanted = std::getenv("MLSYS_SIMD");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (SimdLevel level : {SimdLevel::kScalar, SimdLevel::kAvx2, SimdLevel::kAvx512}) {
    if (std::string(wanted) != name_of(level)) continue;
    if (level <= best) return level;
    throw std::invalid_argument("MLSYS_SIMD=" + std::string(wanted) + " but this CPU offers at most " +
                                name_of(best) + ". Unset MLSYS_SIMD, or name a lower level.");
  }
  throw std::invalid_argument("MLSYS_SIMD=" + std::string(wanted) +
                              " names no instruction set. Expected scalar, avx2 or avx512.");
}

bool choose_prefetch() {
  const char* wanted = std::getenv("MLSYS_PREFETCH");
  if (wanted != nullptr && *wanted != '\0') return *wanted != '0';
#if MLSYS_HAS_X86_LEVELS
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

SimdLevel simd_level() {
  static const SimdLevel level = choose();
  return level;
}

bool prefetch_pays() {
  static const bool pays = choose_prefetch();
  return pays;
}

const char* name_of(SimdLevel level) {
  switch (level) {
    case SimdLevel::kScalar:
      return "scalar";
    case SimdLevel::kAvx2:
      return "avx2";
    case SimdLevel::kAvx512:
      return "avx512";
  }
  return "unknown";
}

}  // namespace mlsys
