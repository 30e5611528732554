// The few operations that rules need, defined so that the CPU and CUDA give the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/half.h"

namespace mlsys {

MLSYS_HD float square_root(float value) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(value);
#else
  return __builtin_sqrtf(value);
#endif
}

// base^exponent by repeated squaring: only multiplications, which IEEE fixes, where pow() may differ between
// libraries. The relative error grows to about exponent * 2^-53, but for base < 1 the power has vanished
// before that matters: 1 - base^n is off by at most max_n(n base^n) 2^-53 < 2^-53 / (e (1 - base)).
MLSYS_HD double power(double base, double exponent) {
  auto left = static_cast<uint64_t>(exponent);
  double result = 1.0;
  for (double square = base; left != 0; left >>= 1, square *= square) {
    if (left & 1u) result *= square;
  }
  return result;
}

}  // namespace mlsys
