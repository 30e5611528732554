// The step of parameters whose every array has elements of 16 bits: a split bf16 parameter, its bf16 gradient
// and bf16 moments.
//
// Two neighbours share a 32-bit word. Each becomes a float where it stands, by a shift or a mask, and goes
// back the same way; so a vector of words is two vectors of floats, and no element is ever moved to another
// lane, which costs more than the rule does. The element formulas are those of rounding.h, so the bits are
// those of BlockOperands. Test: tests/native/test_fused_forms.cpp.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/simd_dispatch.h"
#include "optim/rounding.h"
#include "optim/segment.h"

namespace mlsys {

static_assert(std::endian::native == std::endian::little);

template <class Rule>
struct HalfPairsLoop {
  static_assert(Rule::kNumStates == 2);

  typename Rule::Scalars scalars;
  Segment segment;
  DrawKey state_key;

  MLSYS_INLINE void operator()(int64_t begin, int64_t end) const {
    auto* param = segment.pointer<uint16_t>(segment.param) + begin;
    auto* low = segment.pointer<uint16_t>(segment.master) + begin;
    const auto* grad = segment.pointer<const uint16_t>(segment.grad) + begin;
    auto* first = segment.pointer<uint16_t>(segment.state[0]) + begin;
    auto* second = segment.pointer<uint16_t>(segment.state[1]) + begin;
    const auto element = static_cast<uint32_t>(segment.first_element + begin);
    const auto count = static_cast<uint32_t>(end - begin);
    step_words(param, low, grad, first, second, element, count / 2);
    if (count % 2 == 0) return;
    const uint32_t last = count - 1;
    uint16_t p[2] = {param[last]}, l[2] = {low[last]}, m[2] = {first[last]}, v[2] = {second[last]};
    const uint16_t g[2] = {grad[last]};
    step_words(p, l, g, m, v, element + last, std::integral_constant<uint32_t, 1>{});
    param[last] = p[0];
    low[last] = l[0];
    first[last] = m[0];
    second[last] = v[0];
  }

 private:
  // What is stored of one element, each in the upper half of a word; but `low`, in the lower one.
  struct Element {
    uint32_t param, low, first, second;
  };

  // `low` is in the upper half here, too.
  static MLSYS_INLINE Element stepped(const typename Rule::Scalars& s, uint32_t grad, const Element& old,
                                      uint32_t random) {
    float param = join_words(old.param, old.low);
    float state[kMaxStates] = {float_from_bits(old.first), float_from_bits(old.second), 0.0f};
    Rule::update(s, float_from_bits(grad), param, state);
    return {word_away(param), low_word(param), word_by_chance(state[0], random & 0xffffu),
            word_by_chance(state[1], random >> 16)};
  }

  template <class Count>
  MLSYS_INLINE void step_words(uint16_t* __restrict param, uint16_t* __restrict low,
                               const uint16_t* __restrict grad, uint16_t* __restrict first,
                               uint16_t* __restrict second, uint32_t element, Count words) const {
    const typename Rule::Scalars s = scalars;
    const DrawKey key = state_key;
    for (uint32_t i = 0; i < words; ++i) {
      const uint32_t g = word_at(grad, i);
      const Element both{word_at(param, i), word_at(low, i), word_at(first, i), word_at(second, i)};
      const Element left =
          stepped(s, g << 16, {both.param << 16, both.low << 16, both.first << 16, both.second << 16},
                  draw(key, element + 2 * i));
      const Element right =
          stepped(s, g & kUpper, {both.param & kUpper, both.low, both.first & kUpper, both.second & kUpper},
                  draw(key, element + 2 * i + 1));
      put_word(param, i, left.param >> 16 | (right.param & kUpper));
      put_word(low, i, (left.low & ~kUpper) | right.low << 16);
      put_word(first, i, left.first >> 16 | (right.first & kUpper));
      put_word(second, i, left.second >> 16 | (right.second & kUpper));
    }
  }

  static constexpr uint32_t kUpper = 0xffff0000u;

  static MLSYS_INLINE uint32_t word_at(const uint16_t* halves, uint32_t i) {
    uint32_t word;
    std::memcpy(&word, halves + 2 * static_cast<size_t>(i), sizeof(word));
    return word;
  }

  static MLSYS_INLINE void put_word(uint16_t* halves, uint32_t i, uint32_t word) {
    std::memcpy(halves + 2 * static_cast<size_t>(i), &word, sizeof(word));
  }
};

}  // namespace mlsys
