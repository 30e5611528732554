// Between stored forms and floats, one loop for each form. Give them to run_simd, or call them from a kernel.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/simd_dispatch.h"
#include "optim/codes.h"
#include "optim/segment.h"

namespace mlsys {

struct Unpack {
  template <class T>
  MLSYS_INLINE void operator()(const T* __restrict from, float* __restrict to, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
  }
};

struct JoinHalves {
  MLSYS_INLINE void operator()(const BFloat16* __restrict high, const uint16_t* __restrict low,
                               float* __restrict to, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) to[i] = join_halves(high[i], low[i]);
  }
};

struct SplitHalves {
  MLSYS_INLINE void operator()(const float* __restrict from, BFloat16* __restrict high,
                               uint16_t* __restrict low, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      high[i] = to_bfloat16_away(from[i]);
      low[i] = low_half(from[i]);
    }
  }
};

MLSYS_INLINE BFloat16 nearest(BFloat16, float value) { return to_bfloat16_away(value); }
MLSYS_INLINE Float16 nearest(Float16, float value) { return to_float16(value); }
MLSYS_INLINE BFloat16 by_chance(BFloat16, float value, uint32_t random) {
  return to_bfloat16_by_chance(value, random);
}
MLSYS_INLINE Float16 by_chance(Float16, float value, uint32_t random) {
  return to_float16_by_chance(value, random);
}

// A parameter that is not its copy's rounding was written by somebody else, who is right.
struct LoadCopied {
  template <class T>
  MLSYS_INLINE void operator()(const T* __restrict param, const float* __restrict copy, float* __restrict to,
                               int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = nearest(T{}, copy[i]).bits == param[i].bits ? copy[i] : to_float(param[i]);
    }
  }
};

struct StoreCopied {
  template <class T>
  MLSYS_INLINE void operator()(const float* __restrict from, T* __restrict param, float* __restrict copy,
                               int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      param[i] = nearest(T{}, from[i]);
      copy[i] = from[i];
    }
  }
};

struct StoreByChance {
  template <class T>
  MLSYS_INLINE void operator()(const float* __restrict from, const uint32_t* __restrict draws, int shift,
                               T* __restrict to, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) to[i] = by_chance(T{}, from[i], draws[i] >> shift & 0xffffu);
  }
};

// Calls body(first, count) for each code block; a constant count where it is whole, which is what loops of
// four vectors need to be straight code.
template <class Body>
MLSYS_INLINE void each_code_block(int64_t count, Body body) {
  int64_t first = 0;
  for (; first + kCodeBlock <= count; first += kCodeBlock) {
    body(first, std::integral_constant<int64_t, kCodeBlock>{});
  }
  if (first < count) body(first, count - first);
}

struct LoadCodes {
  bool has_sign;

  MLSYS_INLINE void operator()(const uint8_t* __restrict codes, const uint8_t* __restrict scales,
                               float* __restrict to, int64_t count) const {
    has_sign ? run<true>(codes, scales, to, count) : run<false>(codes, scales, to, count);
  }

  template <bool kHasSign>
  static MLSYS_INLINE void run(const uint8_t* __restrict codes, const uint8_t* __restrict scales,
                               float* __restrict to, int64_t count) {
    each_code_block(count, [=](int64_t first, auto length) __attribute__((always_inline)) {
      const float scale = scale_of(scales[first / kCodeBlock]);
      for (int64_t i = 0; i < length; ++i) {
        to[first + i] = kHasSign ? from_signed_code(codes[first + i], scale)
                                 : from_unsigned_code(codes[first + i], scale);
      }
    });
  }
};

struct StoreCodes {
  bool has_sign;

  MLSYS_INLINE void operator()(const float* __restrict from, const uint32_t* __restrict draws, int shift,
                               uint8_t* __restrict codes, uint8_t* __restrict scales, int64_t count) const {
    has_sign ? run<true>(from, draws, shift, codes, scales, count)
             : run<false>(from, draws, shift, codes, scales, count);
  }

  template <bool kHasSign>
  static MLSYS_INLINE void run(const float* __restrict from, const uint32_t* __restrict draws, int shift,
                               uint8_t* __restrict codes, uint8_t* __restrict scales, int64_t count) {
    each_code_block(count, [=](int64_t first, auto length) __attribute__((always_inline)) {
      uint32_t largest = 0;
      for (int64_t i = 0; i < length; ++i) {
        const uint32_t magnitude = bits_of(from[first + i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
      }
      const uint8_t scale = scale_for(largest);
      const float inverse = inverse_scale_of(scale);
      scales[first / kCodeBlock] = scale;
      for (int64_t i = 0; i < length; ++i) {
        const uint32_t random = draws[first + i] >> shift & 0xffffu;
        codes[first + i] = kHasSign ? to_signed_code(from[first + i], inverse, random)
                                    : to_unsigned_code(from[first + i], inverse, random);
      }
    });
  }
};

struct Draw {
  MLSYS_INLINE void operator()(DrawKey key, uint32_t first, uint32_t* __restrict to, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) to[i] = draw(key, first + static_cast<uint32_t>(i));
  }
};

struct Average {
  float rest;

  MLSYS_INLINE void operator()(const float* __restrict from, float* __restrict average, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) average[i] = average[i] + rest * (from[i] - average[i]);
  }
};

}  // namespace mlsys
