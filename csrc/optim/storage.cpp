#include "optim/storage.h"

#include <cstring>
#include <type_traits>

#include "core/simd_dispatch.h"

namespace mlsys {
namespace {

// One loop for each form; run_simd compiles it for every instruction set.

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

 private:
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

 private:
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

size_t bytes_of(Stored form) {
  switch (form) {
    case Stored::kFloat32:
      return 4;
    case Stored::kBFloat16:
    case Stored::kFloat16:
      return 2;
    default:
      return 1;
  }
}

}  // namespace

BlockOperands::BlockOperands(const Segment& segment, int num_states, double step, double average_decay)
    : segment_(segment),
      format_(segment.stored()),
      num_states_(num_states),
      step_(step),
      average_rest_(static_cast<float>(1.0 - average_decay)),
      level_(simd_level()) {}

void BlockOperands::load(int64_t begin, int64_t count) {
  begin_ = begin;
  count_ = count;
  drawn_ = -1;
  load_param();
  load_grad();
  for (int index = 0; index < num_states_; ++index) load_state(index);
}

void BlockOperands::store() {
  store_param();
  store_states();
  if (segment_.average != 0) {
    run_simd(level_, Average{average_rest_}, static_cast<const float*>(param_),
             segment_.pointer<float>(segment_.average) + begin_, count_);
  }
  if (format_.zeroes_grad()) {
    const size_t bytes = bytes_of(format_.grad());
    std::memset(segment_.pointer<std::byte>(segment_.grad) + static_cast<size_t>(begin_) * bytes, 0,
                static_cast<size_t>(count_) * bytes);
  }
}

void BlockOperands::store_states() {
  for (int index = 0; index < num_states_; ++index) store_state(index);
}

void BlockOperands::load_param() {
  const auto load = [&]<class T>(T) {
    const T* param = segment_.pointer<T>(segment_.param) + begin_;
    param_ = param_buffer_.data();
    if (format_.master() == Master::kFloat32) {
      run_simd(level_, LoadCopied{}, param, segment_.pointer<const float>(segment_.master) + begin_, param_,
               count_);
    } else {
      run_simd(level_, Unpack{}, param, param_, count_);
    }
  };
  if (format_.param() == Stored::kFloat32) {
    param_ = segment_.pointer<float>(segment_.param) + begin_;
  } else if (format_.param() == Stored::kFloat16) {
    load(Float16{});
  } else if (format_.master() == Master::kSplit) {
    param_ = param_buffer_.data();
    run_simd(level_, JoinHalves{}, segment_.pointer<const BFloat16>(segment_.param) + begin_,
             segment_.pointer<const uint16_t>(segment_.master) + begin_, param_, count_);
  } else {
    load(BFloat16{});
  }
}

void BlockOperands::load_grad() {
  const auto unpack = [&]<class T>(T) {
    run_simd(level_, Unpack{}, segment_.pointer<const T>(segment_.grad) + begin_, grad_buffer_.data(),
             count_);
    grad_ = grad_buffer_.data();
  };
  switch (format_.grad()) {
    case Stored::kBFloat16:
      return unpack(BFloat16{});
    case Stored::kFloat16:
      return unpack(Float16{});
    default:
      grad_ = segment_.pointer<const float>(segment_.grad) + begin_;
  }
}

void BlockOperands::load_state(int index) {
  const Stored form = format_.state(index);
  const int64_t address = segment_.state[index];
  const auto slot = static_cast<size_t>(index);
  if (form == Stored::kFloat32) {
    states_[slot] = segment_.pointer<float>(address) + begin_;
    return;
  }
  states_[slot] = state_buffers_[slot].data();
  if (form == Stored::kBFloat16) {
    run_simd(level_, Unpack{}, segment_.pointer<const BFloat16>(address) + begin_, states_[slot], count_);
    return;
  }
  run_simd(level_, LoadCodes{form == Stored::kSigned8}, segment_.pointer<const uint8_t>(address) + begin_,
           segment_.pointer<const uint8_t>(segment_.scale[index]) + begin_ / kCodeBlock, states_[slot],
           count_);
}

// Stream 0 serves the first two moments by its halves, stream 1 the parameter and the third moment.
const uint32_t* BlockOperands::draws(uint32_t stream) {
  if (drawn_ != static_cast<int>(stream)) {
    const auto element = static_cast<uint64_t>(segment_.first_element + begin_);
    run_simd(level_, Draw{}, draw_key(segment_.key, step_, stream, element >> 32),
             static_cast<uint32_t>(element), draws_.data(), count_);
    drawn_ = static_cast<int>(stream);
  }
  return draws_.data();
}

void BlockOperands::store_param() {
  const auto store = [&]<class T>(T) {
    T* param = segment_.pointer<T>(segment_.param) + begin_;
    if (format_.master() == Master::kFloat32) {
      run_simd(level_, StoreCopied{}, static_cast<const float*>(param_), param,
               segment_.pointer<float>(segment_.master) + begin_, count_);
    } else {
      run_simd(level_, StoreByChance{}, static_cast<const float*>(param_), draws(1), 0, param, count_);
    }
  };
  if (format_.param() == Stored::kFloat32) return;
  if (format_.param() == Stored::kFloat16) return store(Float16{});
  if (format_.master() != Master::kSplit) return store(BFloat16{});
  run_simd(level_, SplitHalves{}, static_cast<const float*>(param_),
           segment_.pointer<BFloat16>(segment_.param) + begin_,
           segment_.pointer<uint16_t>(segment_.master) + begin_, count_);
}

void BlockOperands::store_state(int index) {
  const Stored form = format_.state(index);
  if (form == Stored::kFloat32) return;
  const float* from = states_[static_cast<size_t>(index)];
  const uint32_t* random = draws(index < 2 ? 0 : 1);
  const int shift = index == 0 ? 0 : 16;
  const int64_t address = segment_.state[index];
  if (form == Stored::kBFloat16) {
    run_simd(level_, StoreByChance{}, from, random, shift, segment_.pointer<BFloat16>(address) + begin_,
             count_);
    return;
  }
  run_simd(level_, StoreCodes{form == Stored::kSigned8}, from, random, shift,
           segment_.pointer<uint8_t>(address) + begin_,
           segment_.pointer<uint8_t>(segment_.scale[index]) + begin_ / kCodeBlock, count_);
}

}  // namespace mlsys
