// Steps of bf16 parameters and narrow moments in one loop: what the general driver does block by block.
//
// The same formulas on the same elements, so the same bits as BlockOperands gives; but conversions and rule
// stand in one loop, where a processor works on one element's integers while it divides for another. Worth
// its compile time for the forms that models are trained in, and for rules that many use: a rule opts in by
//
//   template <>
//   struct mlsys::FusedForms<Rule> : mlsys::CommonForms<Rule> {};
//
// before its steps are instantiated. Test: tests/native/test_fused_forms.cpp.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/simd_dispatch.h"
#include "optim/codes.h"
#include "optim/half_pairs.h"
#include "optim/segment.h"
#include "optim/storage_kernels.h"

namespace mlsys {

template <Stored kParamForm, Master kMasterForm, Stored kGradForm, Stored kFirst, Stored kSecond>
struct StaticForm {
  static constexpr Stored kParam = kParamForm;
  static constexpr Master kMaster = kMasterForm;
  static constexpr Stored kGrad = kGradForm;
  static constexpr Stored kStates[2] = {kFirst, kSecond};
  static constexpr uint64_t kBits = static_cast<uint64_t>(kParam) | static_cast<uint64_t>(kGrad) << 4 |
                                    static_cast<uint64_t>(kMaster) << 8 |
                                    static_cast<uint64_t>(kFirst) << 12 |
                                    static_cast<uint64_t>(kSecond) << 16;
  static constexpr bool kIsAllHalves = kMaster == Master::kSplit && kParam == Stored::kBFloat16 &&
                                       kGrad == Stored::kBFloat16 && kFirst == Stored::kBFloat16 &&
                                       kSecond == Stored::kBFloat16;  // half_pairs.h
};

template <Stored kForm>
using ElementOf = std::conditional_t<kForm == Stored::kFloat32, float,
                                     std::conditional_t<kForm == Stored::kBFloat16, BFloat16, uint8_t>>;

template <class Rule, class Form>
struct FusedLoop {
  static_assert(Rule::kNumStates == 2);
  static constexpr bool kIsSplit = Form::kMaster == Master::kSplit;
  static constexpr bool kRandomParam = Form::kParam == Stored::kBFloat16 && !kIsSplit;

  typename Rule::Scalars scalars;
  Segment segment;
  DrawKey state_key, param_key;

  MLSYS_INLINE void operator()(int64_t begin, int64_t end) const {
    int64_t from = begin;
    for (; from + kCodeBlock <= end; from += kCodeBlock) {
      block(from, std::integral_constant<int64_t, kCodeBlock>{});
    }
    if (from < end) block(from, end - from);
  }

 private:
  template <class Count>
  MLSYS_INLINE void block(int64_t from, Count count) const {
    alignas(64) float param_buffer[kCodeBlock], grad_buffer[kCodeBlock];
    alignas(64) float first_buffer[kCodeBlock], second_buffer[kCodeBlock];
    alignas(64) uint32_t draws[kCodeBlock];
    auto* param = segment.pointer<ElementOf<Form::kParam>>(segment.param) + from;
    auto* low = segment.pointer<uint16_t>(segment.master) + (kIsSplit ? from : 0);
    const auto* grad = segment.pointer<const ElementOf<Form::kGrad>>(segment.grad) + from;
    const uint32_t element = static_cast<uint32_t>(segment.first_element + from);

    float* p = param_buffer;
    if constexpr (Form::kParam == Stored::kFloat32) {
      p = param;
    } else if constexpr (kIsSplit) {
      JoinHalves{}(param, low, p, count);
    } else {
      Unpack{}(param, p, count);
    }
    const float* g = grad_buffer;
    if constexpr (Form::kGrad == Stored::kFloat32) {
      g = grad;
    } else {
      Unpack{}(grad, grad_buffer, count);
    }
    float* m = load_state<0>(first_buffer, from, count);
    float* v = load_state<1>(second_buffer, from, count);
    update(p, g, m, v, count);
    if constexpr (kIsSplit) SplitHalves{}(p, param, low, count);
    if constexpr (kRandomParam) {
      Draw{}(param_key, element, draws, count);
      StoreByChance{}(p, draws, 0, param, count);
    }
    if constexpr (Form::kStates[0] != Stored::kFloat32) Draw{}(state_key, element, draws, count);
    store_state<0>(m, draws, from, count);
    store_state<1>(v, draws, from, count);
  }

  template <class Count>
  MLSYS_INLINE void update(float* __restrict p, const float* __restrict g, float* __restrict m,
                           float* __restrict v, Count count) const {
    const typename Rule::Scalars s = scalars;
    for (int64_t i = 0; i < count; ++i) {
      float state[kMaxStates] = {m[i], v[i], 0.0f};
      float value = p[i];
      Rule::update(s, g[i], value, state);
      p[i] = value;
      m[i] = state[0];
      v[i] = state[1];
    }
  }

  template <int kIndex, class Count>
  MLSYS_INLINE float* load_state(float* buffer, int64_t from, Count count) const {
    constexpr Stored kForm = Form::kStates[kIndex];
    auto* stored = segment.pointer<ElementOf<kForm>>(segment.state[kIndex]) + from;
    if constexpr (kForm == Stored::kFloat32) {
      return stored;
    } else if constexpr (kForm == Stored::kBFloat16) {
      Unpack{}(stored, buffer, count);
    } else {
      LoadCodes::run<kForm == Stored::kSigned8>(stored, scales<kIndex>(from), buffer, count);
    }
    return buffer;
  }

  template <int kIndex, class Count>
  MLSYS_INLINE void store_state(const float* values, const uint32_t* draws, int64_t from, Count count) const {
    constexpr Stored kForm = Form::kStates[kIndex];
    constexpr int kShift = 16 * kIndex;
    auto* stored = segment.pointer<ElementOf<kForm>>(segment.state[kIndex]) + from;
    if constexpr (kForm == Stored::kBFloat16) {
      StoreByChance{}(values, draws, kShift, stored, count);
    } else if constexpr (kForm != Stored::kFloat32) {
      StoreCodes::run<kForm == Stored::kSigned8>(values, draws, kShift, stored, scales<kIndex>(from), count);
    }
  }

  template <int kIndex>
  MLSYS_INLINE uint8_t* scales(int64_t from) const {
    return segment.pointer<uint8_t>(segment.scale[kIndex]) + from / kCodeBlock;
  }
};

// For rules with a signed and an unsigned moment.
template <class Rule>
struct CommonForms {
  // Steps elements [begin, end) where the segment's form is one of these; false where it is not.
  static bool step(const typename Rule::Scalars& scalars, const Segment& segment, double step, int64_t begin,
                   int64_t end) {
    constexpr Stored kWide = Stored::kFloat32, kHalf = Stored::kBFloat16;
    constexpr Stored kSigned = Stored::kSigned8, kUnsigned = Stored::kUnsigned8;
    constexpr Master kSplit = Master::kSplit, kNone = Master::kNone;
    if (segment.average != 0 || segment.first_element + segment.numel > int64_t{1} << 32) return false;
    return (run<StaticForm<kHalf, kSplit, kHalf, kWide, kWide>>(scalars, segment, step, begin, end) ||
            run<StaticForm<kHalf, kSplit, kHalf, kHalf, kHalf>>(scalars, segment, step, begin, end) ||
            run<StaticForm<kHalf, kSplit, kHalf, kSigned, kUnsigned>>(scalars, segment, step, begin, end) ||
            run<StaticForm<kHalf, kSplit, kWide, kWide, kWide>>(scalars, segment, step, begin, end) ||
            run<StaticForm<kHalf, kSplit, kWide, kSigned, kUnsigned>>(scalars, segment, step, begin, end) ||
            run<StaticForm<kHalf, kNone, kHalf, kSigned, kUnsigned>>(scalars, segment, step, begin, end) ||
            run<StaticForm<kWide, kNone, kWide, kSigned, kUnsigned>>(scalars, segment, step, begin, end));
  }

 private:
  template <class Form>
  static bool run(const typename Rule::Scalars& scalars, const Segment& segment, double step, int64_t begin,
                  int64_t end) {
    if (segment.stored().bits != Form::kBits) return false;
    const DrawKey state_key = draw_key(segment.key, step, 0, 0),
                  param_key = draw_key(segment.key, step, 1, 0);
    if constexpr (Form::kIsAllHalves) {
      run_simd(simd_level(), HalfPairsLoop<Rule>{scalars, segment, state_key}, begin, end);
    } else {
      run_simd(simd_level(), FusedLoop<Rule, Form>{scalars, segment, state_key, param_key}, begin, end);
    }
    return true;
  }
};

}  // namespace mlsys
