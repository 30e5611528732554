// One element of 64 that share a step: as a whole number of steps (int8), or as an e4m3 float times the step
// (fp8).
//
// int8   code - 128 in [-127, 127] steps; step = largest / 127.
// fp8    e4m3 as OCP defines it (bias 7, at most 448), step = the power of two that puts the largest in
//        (224, 448]. Values of at most 4 significant bits within 2^14 of the largest survive unchanged.
//
// Steps are float32 and at least 2^-126, so that what is far below float32's normal range is coded in steps
// of 2^-126 (int8) and 2^-135 (fp8).
//
// Rounding is by chance, so that the expectation of what is unpacked is what was packed, to 1/512 of a code's
// spacing, and gradients, linear in it, stay unbiased. A value that is a code stays that code, zero among
// them. The 8 random bits of an element are a function of (seed, element, largest of the block) and of
// nothing else: the same activation is packed into the same bits wherever and however often, and another one,
// of the next layer or step, draws anew without anybody counting.
//
// A block with an inf or a nan has a negative step; then the largest code of each sign is inf and -inf, one
// more is nan, and each comes back in its place. Its finite elements are coded as ever, by the largest of
// them, and cut to the codes below. No finite element comes back as inf: see needs_care.
//
// One formula for CPU and CUDA, every operation IEEE and in float32. Reference:
// mlsys_engine/activation/torch_packing.py; test: tests/activation/test_packing.py.
#pragma once

#include <cstdint>

#include "activation/pack/forms.h"
#include "core/half.h"
#include "optim/rounding.h"

namespace mlsys::packing {

constexpr uint32_t kInfBits = 0x7f800000u;

MLSYS_HD uint32_t magnitude_of(float value) { return bits_of(value) & 0x7fffffffu; }
// That of finite values; 0 of others.
MLSYS_HD uint32_t finite_magnitude_of(float value) {
  return magnitude_of(value) < kInfBits ? magnitude_of(value) : 0u;
}
struct Step {
  float step, inverse;
};

// Byte number `part` of a word, and half of one unit more, with its lowest bit at kTo: the random bits of one
// of the four elements that share a word.
template <int kTo>
MLSYS_HD uint32_t random_part(uint32_t word, int part) {
  const uint32_t moved = part * 8 < kTo ? word << (kTo - part * 8) : word >> (part * 8 - kTo);
  return (moved & (0xffu << kTo)) | (1u << (kTo - 1));
}

struct Int8 {
  static constexpr uint32_t kInf = 255, kMinusInf = 1, kNan = 0;

  static MLSYS_HD Step step_for(uint32_t largest_bits) {
    constexpr uint32_t kLeast = 0x03fe0000u;  // 127 * 2^-126
    const float largest = float_from_bits(largest_bits > kLeast ? largest_bits : kLeast);
    return {largest / 127.0f, 127.0f / largest};
  }

  // Below 128 + 128 a float32 has room for what is random, and truncation rounds down, as the sum is
  // positive. The division's rounding cannot make it less than 1 or 256: the random part is in (0.001,
  // 0.999).
  static MLSYS_HD uint32_t encode(float relative, uint32_t word, int part) {
    const float sum = relative + float_from_bits(0x43000000u | random_part<8>(word, part));
    return static_cast<uint32_t>(static_cast<int32_t>(sum));
  }

  // 2^23 + code is a float whose last bit is 1.
  static MLSYS_HD float decode(uint32_t code) {
    return float_from_bits(0x4b000000u | code) - (0x1p23f + 128.0f);
  }

  // The code, or the nearest that special blocks have for finite elements.
  static MLSYS_HD uint32_t cut(uint32_t code) { return code > 254u ? 254u : code < 2u ? 2u : code; }
};

struct Fp8 {
  static constexpr uint32_t kInf = 0x7e, kMinusInf = 0xfe, kNan = 0x7f;
  static constexpr uint32_t kBase = 120u << 3;  // what the exponent of float32 has beyond that of e4m3

  static MLSYS_HD Step step_for(uint32_t largest_bits) {
    const uint32_t above = (largest_bits + 0x1fffffu) >> 23;  // the next power where the fraction is over .75
    const uint32_t exponent = above > 9u ? above : 9u;
    return {float_from_bits((exponent - 8u) << 23), float_from_bits((262u - exponent) << 23)};
  }

  // Below 2^-6, where e4m3 has no more exponents, adding 2^-6 lines the fraction up with that of its
  // neighbours above; their codes are 8 higher.
  static MLSYS_HD uint32_t encode(float relative, uint32_t word, int part) {
    const float magnitude = float_from_bits(magnitude_of(relative));
    const bool below = magnitude < 0x1p-6f;
    const float aligned = magnitude + (below ? 0x1p-6f : 0.0f);
    const uint32_t code =
        ((bits_of(aligned) + random_part<12>(word, part)) >> 20) - (below ? kBase + 8u : kBase);
    return code | (bits_of(relative) >> 24 & 0x80u);
  }

  static MLSYS_HD float decode(uint32_t code) {
    const uint32_t magnitude = code & 0x7fu;
    const bool below = magnitude < 8u;
    const float raised = float_from_bits((magnitude + (below ? kBase + 8u : kBase)) << 20);
    const float relative = raised - (below ? 0x1p-6f : 0.0f);
    return float_from_bits(bits_of(relative) | (code & 0x80u) << 24);
  }

  static MLSYS_HD uint32_t cut(uint32_t code) {
    return (code & 0x7fu) > 0x7du ? (code & 0x80u) | 0x7du : code;
  }
};

// The elements j, j + 16, j + 32 and j + 48 of a block share a random word, and their codes are the bytes of
// word j of the block, the lowest first. So vectors of 32-bit words pack and unpack without moving anything
// to another lane, which costs more than the formulas do.
constexpr int64_t kWords = kBlock / 4;

MLSYS_HD DrawKey block_key(DrawKey key, uint32_t largest_bits) {
  return {key.first, key.second ^ largest_bits * 0x9e3779b1u};
}
MLSYS_HD uint32_t draw_four(DrawKey block_key, int64_t block, uint32_t j) {
  return draw(block_key, static_cast<uint32_t>(block) * 16u + j);
}

// Of a block without inf and nan; in one with them, special_code_of.
template <class Codes>
MLSYS_HD uint32_t code_of(float value, float inverse, uint32_t word, int part) {
  return Codes::encode(value * inverse, word, part);
}
template <class Codes>
MLSYS_HD uint32_t special_code_of(float value, float inverse, uint32_t word, int part) {
  const uint32_t magnitude = magnitude_of(value);
  if (magnitude > kInfBits) return Codes::kNan;
  if (magnitude == kInfBits) return bits_of(value) >> 31 ? Codes::kMinusInf : Codes::kInf;
  return Codes::cut(code_of<Codes>(value, inverse, word, part));
}

template <class Codes>
MLSYS_HD float unpacked(uint32_t code, float step) {
  return Codes::decode(code) * step;
}

// Whether a block is special, or its largest so large that rounding up may leave the dtype's range.
MLSYS_HD bool needs_care(float step, float most) {
  return !(step > 0.0f && step < (most > 65504.0f ? 0x1p120f : 0x1p8f));
}
template <class Codes>
MLSYS_HD float carefully_unpacked(uint32_t code, float step, float most) {
  if (step < 0.0f) {
    if (code == Codes::kNan) return float_from_bits(0x7fc00000u);
    if (code == Codes::kInf) return float_from_bits(kInfBits);
    if (code == Codes::kMinusInf) return float_from_bits(kInfBits | 0x80000000u);
  }
  const float value = Codes::decode(code) * (step < 0.0f ? -step : step);
  return value > most ? most : value < -most ? -most : value;
}

MLSYS_HD float largest_finite(float) { return float_from_bits(0x7f7fffffu); }
MLSYS_HD float largest_finite(BFloat16) { return float_from_bits(0x7f7f0000u); }
MLSYS_HD float largest_finite(Float16) { return 65504.0f; }

// Of a value that is not nan, within the dtype's range.
MLSYS_HD float narrowed(float, float value) { return value; }
MLSYS_HD BFloat16 narrowed(BFloat16, float value) {
  const uint32_t bits = bits_of(value);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
MLSYS_HD Float16 narrowed(Float16, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const float aligned = float_from_bits(magnitude) + 0.5f;  // as in to_float16
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t half = magnitude < 0x38800000u ? bits_of(aligned) - 0x3f000000u : normal;
  return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | half)};
}

MLSYS_HD float narrowed_carefully(float, float value) { return value; }
MLSYS_HD BFloat16 narrowed_carefully(BFloat16, float value) { return to_bfloat16(value); }
MLSYS_HD Float16 narrowed_carefully(Float16, float value) { return to_float16(value); }

inline DrawKey key_of(int64_t seed) { return draw_key(seed, 0.0, 0, 0); }

}  // namespace mlsys::packing
