// One element and one bit, and eight bytes of 0 or 1 and one byte.
//
// Integer code without a branch, so that compilers vectorise it and the GPU gives the same bits.
#pragma once

#include <cstdint>

#include "core/half.h"

namespace mlsys::packing {

constexpr uint64_t kEachByte = 0x0101010101010101ull;

// What ReLU's backward asks of its result: the gradient passes unless x <= 0, so it passes a nan.
MLSYS_HD bool is_positive(float x) { return !(x <= 0.0f); }
MLSYS_HD bool is_positive_half(uint16_t bits, uint16_t inf) {
  return static_cast<uint16_t>(bits - 1) < 0x7fff || (bits & 0x7fff) > inf;
}
MLSYS_HD bool is_positive(BFloat16 x) { return is_positive_half(x.bits, 0x7f80); }
MLSYS_HD bool is_positive(Float16 x) { return is_positive_half(x.bits, 0x7c00); }

// The same for 1 or 0, in the dtype's own bits: `bit` is 0 or 1.
MLSYS_HD float one_or_zero(float, uint32_t bit) { return float_from_bits((0u - bit) & 0x3f800000u); }
MLSYS_HD BFloat16 one_or_zero(BFloat16, uint32_t bit) {
  return {static_cast<uint16_t>((0u - bit) & 0x3f80u)};
}
MLSYS_HD Float16 one_or_zero(Float16, uint32_t bit) { return {static_cast<uint16_t>((0u - bit) & 0x3c00u)}; }

// 1 in each byte that is not 0. No byte carries into the next: 0x7f + 0x7f is below 0x100.
MLSYS_HD uint64_t ones_of(uint64_t bytes) {
  constexpr uint64_t kLow = 0x7f * kEachByte;
  return (((bytes & kLow) + kLow) | bytes) >> 7 & kEachByte;
}

// Bit k is byte k of `ones`, the lowest byte first. The product moves byte k to bit 56 + k, and no two of its
// terms meet in a bit.
MLSYS_HD uint8_t gather_bits(uint64_t ones) {
  return static_cast<uint8_t>((ones * 0x0102040810204080ull) >> 56);
}

// The inverse: byte k is bit k.
MLSYS_HD uint64_t spread_bits(uint8_t bits) { return ones_of((bits * kEachByte) & 0x8040201008040201ull); }

}  // namespace mlsys::packing
