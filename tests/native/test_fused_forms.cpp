// The one-loop steps of csrc/optim/fused_forms.h give the bits of the general driver.
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "optim/fused_forms.h"
#include "optim/rules/adamw.h"
#include "optim/step.h"

namespace {

using namespace mlsys;

// A parameter of 64 * 5 + 7 elements in any form, with everything that a form may need.
struct StoredParameter {
  static constexpr int64_t kNumel = 64 * 5 + 7;
  std::vector<uint32_t> param = std::vector<uint32_t>(kNumel), grad = param, first = param, second = param;
  std::vector<uint16_t> low = std::vector<uint16_t>(kNumel);
  std::vector<uint8_t> first_scales = std::vector<uint8_t>(6, 120),
                       second_scales = std::vector<uint8_t>(6, 110);

  explicit StoredParameter(uint64_t form) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<uint32_t>& to, bool is_narrow, bool has_codes, bool is_positive) {
      auto* bytes = reinterpret_cast<uint8_t*>(to.data());
      for (int64_t i = 0; i < kNumel; ++i) {
        const float value = is_positive ? std::abs(normal(random)) : normal(random);
        if (has_codes) {
          bytes[i] = static_cast<uint8_t>(random());
        } else if (is_narrow) {
          reinterpret_cast<uint16_t*>(bytes)[i] = to_bfloat16(value).bits;
        } else {
          std::memcpy(bytes + 4 * i, &value, 4);
        }
      }
    };
    const Format format{form};
    const auto narrow = [](Stored stored) { return stored == Stored::kBFloat16; };
    const auto codes = [](Stored stored) {
      return stored == Stored::kSigned8 || stored == Stored::kUnsigned8;
    };
    fill(param, narrow(format.param()), false, false);
    fill(grad, narrow(format.grad()), false, false);
    fill(first, narrow(format.state(0)), codes(format.state(0)), false);
    fill(second, narrow(format.state(1)), codes(format.state(1)), true);
  }

  // Nan and both infs among bf16 gradients: on either side of a word, and in the last element.
  void spoil_narrow_gradients() {
    auto* bits = reinterpret_cast<uint16_t*>(grad.data());
    bits[10] = bits[kNumel - 1] = 0x7fc1;
    bits[11] = 0xff80;
    bits[71] = 0x7f81;
    bits[100] = 0x7f80;
  }

  Segment segment(uint64_t form) {
    const auto at = [](auto& values) {
      return static_cast<int64_t>(reinterpret_cast<uintptr_t>(values.data()));
    };
    Segment result{};
    result.param = at(param);
    result.grad = at(grad);
    result.master = at(low);
    result.state[0] = at(first);
    result.state[1] = at(second);
    result.scale[0] = at(first_scales);
    result.scale[1] = at(second_scales);
    result.numel = kNumel;
    result.format = static_cast<int64_t>(form);
    result.key = 99;
    result.first_element = 12345;
    return result;
  }

  bool operator==(const StoredParameter&) const = default;
};

template <class Form>
void check_form(bool with_bad_gradients = false) {
  const double hyper[kHyperColumns] = {1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0};
  const auto scalars = AdamW::prepare(hyper, 3.0, 0.5);
  StoredParameter fused(Form::kBits), general(Form::kBits);
  for (StoredParameter* stored : {&fused, &general}) {
    if (with_bad_gradients) stored->spoil_narrow_gradients();
  }
  const StoredParameter before = fused;
  const Segment fused_segment = fused.segment(Form::kBits), general_segment = general.segment(Form::kBits);
  CHECK(CommonForms<AdamW>::step(scalars, fused_segment, 3.0, 0, StoredParameter::kNumel));
  BlockOperands operands(general_segment, AdamW::kNumStates, 3.0, 0.0);
  step_stored<AdamW>(scalars, operands, 0, StoredParameter::kNumel);
  CHECK(fused == general);
  CHECK(!(fused == before));
}

}  // namespace

TEST(every_fused_form_has_the_bits_of_the_general_driver) {
  constexpr Stored kWide = Stored::kFloat32, kHalf = Stored::kBFloat16;
  constexpr Stored kSigned = Stored::kSigned8, kUnsigned = Stored::kUnsigned8;
  check_form<StaticForm<kHalf, Master::kSplit, kHalf, kWide, kWide>>();
  check_form<StaticForm<kHalf, Master::kSplit, kHalf, kHalf, kHalf>>();
  check_form<StaticForm<kHalf, Master::kSplit, kHalf, kSigned, kUnsigned>>();
  check_form<StaticForm<kHalf, Master::kSplit, kWide, kWide, kWide>>();
  check_form<StaticForm<kHalf, Master::kSplit, kWide, kSigned, kUnsigned>>();
  check_form<StaticForm<kHalf, Master::kNone, kHalf, kSigned, kUnsigned>>();
  check_form<StaticForm<kWide, Master::kNone, kWide, kSigned, kUnsigned>>();
}

TEST(nan_and_inf_in_halves_are_rounded_as_the_general_driver_rounds_them) {
  constexpr Stored kHalf = Stored::kBFloat16;
  check_form<StaticForm<kHalf, Master::kSplit, kHalf, kHalf, kHalf>>(/*with_bad_gradients=*/true);
}

TEST(a_form_without_a_loop_of_its_own_is_left_to_the_general_driver) {
  StoredParameter stored(0);
  Segment segment = stored.segment(static_cast<uint64_t>(Stored::kFloat16));
  CHECK(!CommonForms<AdamW>::step({}, segment, 1.0, 0, StoredParameter::kNumel));
  segment.format = 0;
  segment.average = segment.param;
  CHECK(!CommonForms<AdamW>::step({}, segment, 1.0, 0, StoredParameter::kNumel));
}
