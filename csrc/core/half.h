// bfloat16 and float16 storage types with round-to-nearest-even conversion, usable on host and device.
//
// The conversions are plain integer code, so that every instruction set and the GPU give the same bits;
// compilers vectorise the bfloat16 pair. NaN stays NaN (quiet), inf stays inf, float16 overflow becomes inf,
// and float16 subnormals are kept. Reference: IEEE 754-2019, section 3.6; test: tests/core/test_half.py.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__CUDACC__)
#define MLSYS_HD __host__ __device__ __forceinline__
#else
#define MLSYS_HD inline __attribute__((always_inline))
#endif

namespace mlsys {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MLSYS_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  return std::bit_cast<uint32_t>(value);
#endif
}
MLSYS_HD float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

MLSYS_HD float to_float(float value) { return value; }
MLSYS_HD float to_float(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

MLSYS_HD BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded >> 16)};
}

MLSYS_HD float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // inf, nan
    return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  // Rescaling by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals exactly.
  const float scaled = float_from_bits(magnitude << 13) * float_from_bits(0x77800000u);
  return float_from_bits(sign | bits_of(scaled));
}

MLSYS_HD Float16 to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u)
    return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above round to inf
  if (magnitude < 0x38800000u) {
    // Subnormal result: adding 0.5 aligns the last half-precision bit with the last bit of the sum,
    // so the addition itself rounds to nearest even.
    const float aligned = float_from_bits(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bits_of(aligned) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

}  // namespace mlsys
