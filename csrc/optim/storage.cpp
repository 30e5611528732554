#include "optim/storage.h"

#include <cstring>

#include "core/simd_dispatch.h"
#include "optim/storage_kernels.h"

namespace mlsys {
namespace {

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
