// Eight-bit moments: floating-point codes relative to a scale that 64 neighbours share.
//
// signed    a sign, 4 bits of exponent, 3 of fraction, and below 2^-14 of the scale steps of 2^-17 of it. For
//           first moments.
// unsigned  5 bits of exponent and 3 of fraction: 32 octaves. For sums of squares, which spread twice as far.
//           A positive value is never stored as 0, since something will be divided by its root.
//
// The scale is a power of two, kept as one byte, and the largest magnitude of a block is at most 1.875 of it.
// So a decoded block that is encoded again has the same values, whichever of two scales it gets then: state
// that is exported in float32 and loaded again is the state it was. Codes are rounded by chance: rounded to
// nearest, a second moment that changes by a thousandth a step would never move. An inf or nan makes its
// whole block inf or nan.
#pragma once

#include <cstdint>

#include "optim/rounding.h"

namespace mlsys {

constexpr int64_t kCodeBlock = 64;
constexpr uint32_t kSignedBase = 112u << 23;  // what the exponent of float32 has beyond that of the code
constexpr uint32_t kUnsignedBase = 96u << 23;

// The scale byte for a block whose largest magnitude has these float32 bits.
MLSYS_HD uint8_t scale_for(uint32_t largest_bits) {
  const uint32_t exponent =
      (largest_bits + 0x0fffffu) >> 23;  // the next power where the fraction is above .875
  return static_cast<uint8_t>(exponent < 1u ? 1u : exponent);
}
MLSYS_HD float scale_of(uint8_t scale) { return float_from_bits(static_cast<uint32_t>(scale) << 23); }
MLSYS_HD float inverse_scale_of(uint8_t scale) {
  return float_from_bits((scale >= 253u ? 1u : 254u - scale) << 23);
}

// `random` is 16 random bits.
MLSYS_HD uint8_t to_signed_code(float value, float inverse_scale, uint32_t random) {
  const uint32_t sign = bits_of(value) >> 24 & 0x80u;
  const float relative = float_from_bits(bits_of(value) & 0x7fffffffu) * inverse_scale;
  const uint32_t normal = (bits_of(relative) + (random << 4) - kSignedBase) >> 20;
  const auto below =
      static_cast<int32_t>(relative * 0x1p17f + static_cast<float>(static_cast<int32_t>(random)) * 0x1p-16f);
  const uint32_t code = relative < 0x1p-14f ? static_cast<uint32_t>(below) : normal;
  return static_cast<uint8_t>(sign | (code & 0x7fu));
}

MLSYS_HD float from_signed_code(uint8_t code, float scale) {
  const uint32_t magnitude = code & 0x7fu;
  const float normal = float_from_bits((magnitude << 20) + kSignedBase);
  const float below = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-17f;
  const float relative = magnitude < 8u ? below : normal;
  return float_from_bits(bits_of(relative * scale) | (static_cast<uint32_t>(code & 0x80u) << 24));
}

MLSYS_HD uint8_t to_unsigned_code(float value, float inverse_scale, uint32_t random) {
  const uint32_t bits = bits_of(value * inverse_scale) + (random << 4);
  const uint32_t least = kUnsignedBase + (1u << 20);
  const uint32_t code = ((bits < least ? least : bits) - kUnsignedBase) >> 20;
  return static_cast<uint8_t>(value > 0.0f ? code : 0u);
}

MLSYS_HD float from_unsigned_code(uint8_t code, float scale) {
  const float relative = float_from_bits((static_cast<uint32_t>(code) << 20) + kUnsignedBase);
  return code == 0 ? 0.0f * scale : relative * scale;
}

}  // namespace mlsys
