// How one float becomes a narrower one and comes back: split in two halves without loss, or rounded by
// chance.
//
// Integer code but for the test for nan, so that every instruction set and the GPU give the same bits. Tests:
// tests/optim/test_storage.py, against mlsys_engine/optim/reference_storage.py.
#pragma once

#include <cstdint>

#include "core/half.h"

namespace mlsys {

// ---- a bfloat16 and the 16 bits below it

// The bfloat16 is the upper half of this word. Ties go away from zero, because only then can the low half
// tell which way the high half was rounded.
MLSYS_HD uint32_t word_away(float value) { return value != value ? 0x7fc00000u : bits_of(value) + 0x8000u; }
MLSYS_HD BFloat16 to_bfloat16_away(float value) { return {static_cast<uint16_t>(word_away(value) >> 16)}; }

// The low half is the lower half of this word.
MLSYS_HD uint32_t low_word(float value) { return value != value ? 0u : bits_of(value); }
MLSYS_HD uint16_t low_half(float value) { return static_cast<uint16_t>(low_word(value)); }

// A low half of 0x8000 and more says that the high half was rounded up: as a signed number it takes that
// back. Both are the upper halves of their words here; what is below the low one does not matter.
MLSYS_HD float join_words(uint32_t high, uint32_t low) {
  return float_from_bits(high + static_cast<uint32_t>(static_cast<int32_t>(low) >> 16));
}
MLSYS_HD float join_halves(BFloat16 high, uint16_t low) {
  return join_words(static_cast<uint32_t>(high.bits) << 16, static_cast<uint32_t>(low) << 16);
}

// ---- random numbers: a function of (parameter, step, element) and of nothing else

struct DrawKey {
  uint32_t first, second;
};

MLSYS_HD uint64_t mixed(uint64_t x) {  // the finaliser of SplitMix64 (Steele, Lea & Flood 2014)
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// `stream` tells the draws of one element apart; `block` is the element's index divided by 2^32.
MLSYS_HD DrawKey draw_key(int64_t parameter_key, double step, uint32_t stream, uint64_t block) {
  const uint64_t key =
      mixed(static_cast<uint64_t>(parameter_key) +
            mixed(static_cast<uint64_t>(step) * 0x9e3779b97f4a7c15ull + stream + (block << 8)));
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// 32 random bits for an element: a bijection of the 32-bit integers, so draws of one step never repeat.
MLSYS_HD uint32_t draw(DrawKey key, uint32_t element) {
  uint32_t x = element ^ key.first;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ key.second ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// ---- stochastic rounding, by 16 random bits

// Up with the probability of the dropped fraction, so the expectation is the value itself. The bfloat16 is
// the upper half of this word.
MLSYS_HD uint32_t word_by_chance(float value, uint32_t random) {
  return value != value ? 0x7fc00000u : bits_of(value) + random;
}
MLSYS_HD BFloat16 to_bfloat16_by_chance(float value, uint32_t random) {
  return {static_cast<uint16_t>(word_by_chance(value, random) >> 16)};
}

MLSYS_HD Float16 to_float16_by_chance(float value, uint32_t random) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7e00u};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // as to_float16
  if (magnitude < 0x38800000u) {  // subnormal: a multiple of 2^-24
    const float units = float_from_bits(magnitude) * 16777216.0f + static_cast<float>(random) * 0x1p-16f;
    return {static_cast<uint16_t>(sign | static_cast<uint32_t>(units))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + (random >> 3)) >> 13))};
}

}  // namespace mlsys
