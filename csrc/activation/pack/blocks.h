// Packs and unpacks tensors in blocks of 64 elements that share a step; int8.cpp and fp8.cpp say in which
// codes. Formulas, rounding, inf and nan in codes.h, layout in forms.h; elements aligned to their size.
#pragma once

#include <cstring>
#include <type_traits>

#include "activation/pack/codes.h"
#include "activation/pack/tiles.h"

namespace mlsys::packing {

template <class Codes>
struct PackBlocks {
  DrawKey key;

  // `first_block` is the number of the first block in the whole tensor.
  template <class T>
  MLSYS_INLINE void operator()(const T* __restrict from, uint32_t* __restrict words, float* __restrict steps,
                               int64_t first_block, int64_t count) const {
    const int64_t whole = count / kBlock;
    for (int64_t b = 0; b < whole; ++b) {
      steps[b] = pack_block(from + b * kBlock, words + b * kWords, first_block + b);
    }
    const int64_t rest = count - whole * kBlock;
    if (rest == 0) return;
    T padded[kBlock] = {};
    std::memcpy(padded, from + whole * kBlock, static_cast<size_t>(rest) * sizeof(T));
    steps[whole] = pack_block(padded, words + whole * kWords, first_block + whole);
  }

 private:
  template <class T>
  MLSYS_INLINE float pack_block(const T* __restrict from, uint32_t* __restrict words, int64_t block) const {
    if constexpr (std::is_same_v<T, float>) {
      return pack_floats(from, words, block);
    } else {
      alignas(64) float values[kBlock];
      for (int64_t i = 0; i < kBlock; ++i) values[i] = to_float(from[i]);
      return pack_floats(values, words, block);
    }
  }

  MLSYS_INLINE float pack_floats(const float* __restrict values, uint32_t* __restrict words,
                                 int64_t block) const {
    uint32_t largest = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      const uint32_t magnitude = magnitude_of(values[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= kInfBits) [[unlikely]]
      return pack_special(values, words, block);
    const Step step = Codes::step_for(largest);
    const DrawKey own = block_key(key, largest);
    for (uint32_t j = 0; j < kWords; ++j) {
      const uint32_t random = draw_four(own, block, j);
      words[j] = code_of<Codes>(values[j], step.inverse, random, 0) |
                 code_of<Codes>(values[j + 16], step.inverse, random, 1) << 8 |
                 code_of<Codes>(values[j + 32], step.inverse, random, 2) << 16 |
                 code_of<Codes>(values[j + 48], step.inverse, random, 3) << 24;
    }
    return step.step;
  }

  float pack_special(const float* values, uint32_t* words, int64_t block) const {
    uint32_t largest = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      const uint32_t magnitude = finite_magnitude_of(values[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    const Step step = Codes::step_for(largest);
    const DrawKey own = block_key(key, largest);
    for (uint32_t j = 0; j < kWords; ++j) {
      const uint32_t random = draw_four(own, block, j);
      words[j] = 0;
      for (int part = 0; part < 4; ++part) {
        words[j] |= special_code_of<Codes>(values[j + part * kWords], step.inverse, random, part)
                    << (part * 8);
      }
    }
    return -step.step;
  }
};

template <class Codes>
struct UnpackBlocks {
  template <class T>
  MLSYS_INLINE void operator()(const uint32_t* __restrict words, const float* __restrict steps,
                               T* __restrict to, int64_t count) const {
    const int64_t whole = count / kBlock;
    for (int64_t b = 0; b < whole; ++b) unpack_block(words + b * kWords, steps[b], to + b * kBlock);
    const int64_t rest = count - whole * kBlock;
    if (rest == 0) return;
    T padded[kBlock];
    unpack_block(words + whole * kWords, steps[whole], padded);
    std::memcpy(to + whole * kBlock, padded, static_cast<size_t>(rest) * sizeof(T));
  }

 private:
  template <class T>
  static MLSYS_INLINE void unpack_block(const uint32_t* __restrict words, float step, T* __restrict to) {
    if (needs_care(step, largest_finite(T{}))) [[unlikely]]
      return unpack_carefully(words, step, to);
    for (int part = 0; part < 4; ++part) {
      T* __restrict quarter = to + part * kWords;
      for (int64_t j = 0; j < kWords; ++j) {
        quarter[j] = narrowed(T{}, unpacked<Codes>(words[j] >> (part * 8) & 0xffu, step));
      }
    }
  }

  template <class T>
  static void unpack_carefully(const uint32_t* words, float step, T* to) {
    const float most = largest_finite(T{});
    for (int64_t i = 0; i < kBlock; ++i) {
      const uint32_t code = words[i % kWords] >> (i / kWords * 8) & 0xffu;
      to[i] = narrowed_carefully(T{}, carefully_unpacked<Codes>(code, step, most));
    }
  }
};

template <class Codes>
void pack_in_blocks(const Job& job) {
  auto* codes = static_cast<std::byte*>(job.to);
  auto* steps = reinterpret_cast<float*>(codes + code_bytes(job.numel));
  const PackBlocks<Codes> kernel{key_of(job.seed)};
  const bool streams = job.numel >= kStreamedResult;
  with_float(job.dtype, [&]<class T>(T) {
    const auto* from = static_cast<const T*>(job.from);
    over_tiles<kTileBytes>(job, [=](int64_t first, int64_t count) {
      write_result(streams, codes + first, code_bytes(count), [=](void* target) {
        run_simd(simd_level(), kernel, from + first, static_cast<uint32_t*>(target), steps + first / kBlock,
                 first / kBlock, count);
      });
    });
  });
}

template <class Codes>
void unpack_in_blocks(const Job& job) {
  const auto* codes = static_cast<const std::byte*>(job.from);
  const auto* steps = reinterpret_cast<const float*>(codes + code_bytes(job.numel));
  with_float(job.dtype, [&]<class T>(T) {
    auto* to = static_cast<T*>(job.to);
    constexpr int64_t kSize = sizeof(T);
    const bool streams = job.numel * kSize >= kStreamedResult;
    over_tiles<kTileBytes / kSize>(job, [=](int64_t first, int64_t count) {
      write_result(streams, to + first, count * kSize, [=](void* target) {
        run_simd(simd_level(), UnpackBlocks<Codes>{}, reinterpret_cast<const uint32_t*>(codes + first),
                 steps + first / kBlock, static_cast<T*>(target), count);
      });
    });
  });
}

}  // namespace mlsys::packing
