// The operands of a step as floats in registers, whatever form they are stored in: eight elements a thread.
//
// The same element formulas as on the CPU (rounding.h, codes.h), so the bits are the CPU's. Eight threads
// hold the 64 elements that share a scale and agree on it by shuffles, so all threads of a warp take part in
// every round, also those beyond the end.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "optim/codes.h"
#include "optim/segment.h"

namespace mlsys::cuda {

constexpr int kPerThread = 8;

// Reads or writes eight neighbours, by 16 bytes where they are aligned; `count` of them exist.
template <class T>
__device__ __forceinline__ void read_eight(const T* from, T (&to)[kPerThread], int count) {
  constexpr int kWide = sizeof(T) * kPerThread < 16 ? 8 : 16;
  if (count == kPerThread && reinterpret_cast<uintptr_t>(from) % kWide == 0) {
    if constexpr (kWide == 8) {
      const uint2 wide = *reinterpret_cast<const uint2*>(from);
      memcpy(to, &wide, sizeof(wide));
    } else {
#pragma unroll
      for (int part = 0; part < static_cast<int>(sizeof(to)) / 16; ++part) {
        const uint4 wide = reinterpret_cast<const uint4*>(from)[part];
        memcpy(reinterpret_cast<char*>(to) + 16 * part, &wide, sizeof(wide));
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) to[i] = i < count ? from[i] : T{};
}

template <class T>
__device__ __forceinline__ void write_eight(T* to, const T (&from)[kPerThread], int count) {
  constexpr int kWide = sizeof(T) * kPerThread < 16 ? 8 : 16;
  if (count == kPerThread && reinterpret_cast<uintptr_t>(to) % kWide == 0) {
    if constexpr (kWide == 8) {
      uint2 wide;
      memcpy(&wide, from, sizeof(wide));
      *reinterpret_cast<uint2*>(to) = wide;
    } else {
#pragma unroll
      for (int part = 0; part < static_cast<int>(sizeof(from)) / 16; ++part) {
        uint4 wide;
        memcpy(&wide, reinterpret_cast<const char*>(from) + 16 * part, sizeof(wide));
        reinterpret_cast<uint4*>(to)[part] = wide;
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (i < count) to[i] = from[i];
  }
}

template <class T>
__device__ __forceinline__ void read_floats(const T* from, float (&to)[kPerThread], int count) {
  T raw[kPerThread];
  read_eight(from, raw, count);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) to[i] = to_float(raw[i]);
}

// Elements [first, first + count) of a segment, of which this thread has eight or fewer.
struct Eight {
  const Segment& segment;
  int64_t first;
  int count;
  double step;

  __device__ __forceinline__ uint32_t random(uint32_t stream, int i) const {
    const auto element = static_cast<uint64_t>(segment.first_element + first + i);
    return draw(draw_key(segment.key, step, stream, element >> 32), static_cast<uint32_t>(element));
  }

  __device__ __forceinline__ void read_grad(float (&grad)[kPerThread]) const {
    switch (segment.stored().grad()) {
      case Stored::kBFloat16:
        return read_floats(segment.pointer<const BFloat16>(segment.grad) + first, grad, count);
      case Stored::kFloat16:
        return read_floats(segment.pointer<const Float16>(segment.grad) + first, grad, count);
      default:
        return read_floats(segment.pointer<const float>(segment.grad) + first, grad, count);
    }
  }

  __device__ __forceinline__ void zero_grad() const {
    if (segment.stored().grad() == Stored::kFloat32) {
      const float zeros[kPerThread] = {};
      write_eight(segment.pointer<float>(segment.grad) + first, zeros, count);
    } else {
      const uint16_t zeros[kPerThread] = {};
      write_eight(segment.pointer<uint16_t>(segment.grad) + first, zeros, count);
    }
  }

  __device__ __forceinline__ void read_param(float (&param)[kPerThread]) const {
    const Format format = segment.stored();
    if (format.param() == Stored::kFloat32) {
      return read_floats(segment.pointer<const float>(segment.param) + first, param, count);
    }
    if (format.param() == Stored::kFloat16) return read_narrow<Float16>(param);
    if (format.master() != Master::kSplit) return read_narrow<BFloat16>(param);
    BFloat16 high[kPerThread];
    uint16_t low[kPerThread];
    read_eight(segment.pointer<const BFloat16>(segment.param) + first, high, count);
    read_eight(segment.pointer<const uint16_t>(segment.master) + first, low, count);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) param[i] = join_halves(high[i], low[i]);
  }

  __device__ __forceinline__ void write_param(const float (&param)[kPerThread]) const {
    const Format format = segment.stored();
    if (format.param() == Stored::kFloat32) {
      return write_eight(segment.pointer<float>(segment.param) + first, param, count);
    }
    if (format.param() == Stored::kFloat16) return write_narrow<Float16>(param);
    if (format.master() != Master::kSplit) return write_narrow<BFloat16>(param);
    BFloat16 high[kPerThread];
    uint16_t low[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      high[i] = to_bfloat16_away(param[i]);
      low[i] = low_half(param[i]);
    }
    write_eight(segment.pointer<BFloat16>(segment.param) + first, high, count);
    write_eight(segment.pointer<uint16_t>(segment.master) + first, low, count);
  }

  __device__ __forceinline__ void read_state(int index, float (&state)[kPerThread]) const {
    const Stored form = segment.stored().state(index);
    if (form == Stored::kFloat32) {
      return read_floats(segment.pointer<const float>(segment.state[index]) + first, state, count);
    }
    if (form == Stored::kBFloat16) {
      return read_floats(segment.pointer<const BFloat16>(segment.state[index]) + first, state, count);
    }
    uint8_t codes[kPerThread];
    read_eight(segment.pointer<const uint8_t>(segment.state[index]) + first, codes, count);
    const float scale =
        count > 0 ? scale_of(segment.pointer<const uint8_t>(segment.scale[index])[first / kCodeBlock]) : 0.0f;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      state[i] =
          form == Stored::kSigned8 ? from_signed_code(codes[i], scale) : from_unsigned_code(codes[i], scale);
    }
  }

  // Called by all threads of a warp.
  __device__ __forceinline__ void write_state(int index, const float (&state)[kPerThread]) const {
    const Stored form = segment.stored().state(index);
    if (form == Stored::kFloat32) {
      return write_eight(segment.pointer<float>(segment.state[index]) + first, state, count);
    }
    const uint32_t stream = index < 2 ? 0 : 1;
    const int shift = index == 0 ? 0 : 16;
    if (form == Stored::kBFloat16) {
      BFloat16 rounded[kPerThread];
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        rounded[i] = to_bfloat16_by_chance(state[i], random(stream, i) >> shift & 0xffffu);
      }
      return write_eight(segment.pointer<BFloat16>(segment.state[index]) + first, rounded, count);
    }
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (i < count) largest = max(largest, bits_of(state[i]) & 0x7fffffffu);
    }
#pragma unroll
    for (int lanes = 1; lanes < static_cast<int>(kCodeBlock) / kPerThread; lanes *= 2) {
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    }
    const uint8_t scale = scale_for(largest);
    const float inverse = inverse_scale_of(scale);
    uint8_t codes[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const uint32_t chance = random(stream, i) >> shift & 0xffffu;
      codes[i] = form == Stored::kSigned8 ? to_signed_code(state[i], inverse, chance)
                                          : to_unsigned_code(state[i], inverse, chance);
    }
    write_eight(segment.pointer<uint8_t>(segment.state[index]) + first, codes, count);
    if (count > 0 && first % kCodeBlock == 0) {
      segment.pointer<uint8_t>(segment.scale[index])[first / kCodeBlock] = scale;
    }
  }

  template <int kStates>
  __device__ __forceinline__ void read_states(float (&states)[kMaxStates][kPerThread]) const {
#pragma unroll
    for (int index = 0; index < kStates; ++index) read_state(index, states[index]);
  }

  // Called by all threads of a warp.
  template <int kStates>
  __device__ __forceinline__ void write_states(const float (&states)[kMaxStates][kPerThread]) const {
#pragma unroll
    for (int index = 0; index < kStates; ++index) write_state(index, states[index]);
  }

  __device__ __forceinline__ void average(const float (&param)[kPerThread], double decay) const {
    const auto rest = static_cast<float>(1.0 - decay);
    float mean[kPerThread];
    read_floats(segment.pointer<const float>(segment.average) + first, mean, count);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) mean[i] = mean[i] + rest * (param[i] - mean[i]);
    write_eight(segment.pointer<float>(segment.average) + first, mean, count);
  }

 private:
  static __device__ __forceinline__ BFloat16 nearest(BFloat16, float value) {
    return to_bfloat16_away(value);
  }
  static __device__ __forceinline__ Float16 nearest(Float16, float value) { return to_float16(value); }
  static __device__ __forceinline__ BFloat16 by_chance(BFloat16, float value, uint32_t chance) {
    return to_bfloat16_by_chance(value, chance);
  }
  static __device__ __forceinline__ Float16 by_chance(Float16, float value, uint32_t chance) {
    return to_float16_by_chance(value, chance);
  }

  // A parameter that is not its copy's rounding was written by somebody else, who is right.
  template <class T>
  __device__ __forceinline__ void read_narrow(float (&param)[kPerThread]) const {
    T raw[kPerThread];
    read_eight(segment.pointer<const T>(segment.param) + first, raw, count);
    if (segment.stored().master() != Master::kFloat32) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) param[i] = to_float(raw[i]);
      return;
    }
    read_floats(segment.pointer<const float>(segment.master) + first, param, count);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (nearest(T{}, param[i]).bits != raw[i].bits) param[i] = to_float(raw[i]);
    }
  }

  template <class T>
  __device__ __forceinline__ void write_narrow(const float (&param)[kPerThread]) const {
    const bool has_copy = segment.stored().master() == Master::kFloat32;
    T rounded[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      rounded[i] = has_copy ? nearest(T{}, param[i]) : by_chance(T{}, param[i], random(1, i) & 0xffffu);
    }
    write_eight(segment.pointer<T>(segment.param) + first, rounded, count);
    if (has_copy) write_eight(segment.pointer<float>(segment.master) + first, param, count);
  }
};

}  // namespace mlsys::cuda
