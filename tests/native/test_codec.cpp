// The encodings between hosts against plain references: every instruction set, odd sizes, inf, nan, tiny and
// huge values, and error feedback.
#include <cmath>
#include <limits>
#include <random>

#include "check.h"
#include "comm/codec/codec.h"
#include "core/half.h"

namespace {

using namespace mlsys;
using namespace mlsys::comm;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
const std::vector<size_t> kSizes{0, 1, 7, 255, 256, 257, 1000, 4099};

std::vector<SimdLevel> levels() {
  std::vector<SimdLevel> all{SimdLevel::kScalar};
  if (simd_level() >= SimdLevel::kAvx2) all.push_back(SimdLevel::kAvx2);
  if (simd_level() >= SimdLevel::kAvx512) all.push_back(SimdLevel::kAvx512);
  return all;
}

std::vector<float> random_values(size_t count, uint32_t seed, float spread = 1.0F) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0F, spread);
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

struct Coded {
  std::vector<std::byte> bytes;
  std::vector<float> decoded;
};

Coded coded(const Codec& codec, const std::vector<float>& values, float* residual) {
  Coded result{std::vector<std::byte>(codec.encoded_bytes(values.size())), std::vector<float>(values.size())};
  codec.encode(values.data(), residual, result.bytes.data(), values.size());
  codec.decode(result.bytes.data(), result.decoded.data(), values.size());
  return result;
}

// The largest magnitude in the block of element i.
float largest_beside(const std::vector<float>& values, size_t i) {
  float largest = 0.0F;
  const size_t first = i / Codec::kBlock * Codec::kBlock;
  for (size_t k = first; k < std::min(values.size(), first + Codec::kBlock); ++k) {
    largest = std::max(largest, std::abs(values[k]));
  }
  return largest;
}

}  // namespace

TEST(bf16_decodes_to_the_conversion_of_core) {
  for (const SimdLevel level : levels()) {
    for (const size_t count : kSizes) {
      std::vector<float> values = random_values(count, 1);
      if (count > 6) values[2] = kInf, values[3] = -kInf, values[4] = kNan, values[5] = 3.4e38F;
      const Coded result = coded(Codec(Compression::kBFloat16, level), values, nullptr);
      for (size_t i = 0; i < count; ++i) {
        CHECK_EQUAL(bits_of(result.decoded[i]), bits_of(to_float(to_bfloat16(values[i]))));
      }
    }
  }
}

TEST(int8_is_within_half_a_step_of_its_block) {
  for (const SimdLevel level : levels()) {
    for (const size_t count : kSizes) {
      const std::vector<float> values = random_values(count, 2);
      const Coded result = coded(Codec(Compression::kInt8, level), values, nullptr);
      for (size_t i = 0; i < count; ++i) {
        const float step = largest_beside(values, i) / 127.0F;
        // Half a step, and a few fp32 roundings of values up to 127 steps.
        CHECK(std::abs(result.decoded[i] - values[i]) <= step * (0.5F + 1e-4F));
      }
    }
  }
}

TEST(all_instruction_sets_encode_to_the_same_bytes) {
  for (const Compression compression : {Compression::kBFloat16, Compression::kInt8}) {
    for (const size_t count : kSizes) {
      std::vector<float> values = random_values(count, 3);
      if (count > 300) values[270] = kNan, values[271] = kInf, values[290] = -kInf;
      std::vector<float> first_residual = random_values(count, 4, 0.01F);
      const std::vector<float> start = first_residual;
      const Coded first = coded(Codec(compression, SimdLevel::kScalar), values, first_residual.data());
      for (const SimdLevel level : levels()) {
        std::vector<float> residual = start;
        const Coded other = coded(Codec(compression, level), values, residual.data());
        CHECK(other.bytes == first.bytes);
        for (size_t i = 0; i < count; ++i) CHECK_EQUAL(bits_of(other.decoded[i]), bits_of(first.decoded[i]));
        CHECK(residual == first_residual);
      }
    }
  }
}

TEST(int8_rounds_to_nearest_even) {
  const std::vector<float> given{127.0F, 0.5F, 1.5F, 2.5F, -0.5F, -1.5F, -2.5F, 126.4F};
  const std::vector<float> expected{127.0F, 0.0F, 2.0F, 2.0F, 0.0F, -2.0F, -2.0F, 126.0F};
  const Coded result = coded(Codec(Compression::kInt8), given, nullptr);
  for (size_t i = 0; i < given.size(); ++i) CHECK_EQUAL(result.decoded[i], expected[i]);
}

TEST(int8_passes_inf_and_nan_and_keeps_their_neighbours) {
  for (const SimdLevel level : levels()) {
    std::vector<float> values = random_values(600, 5);
    values[3] = kInf, values[4] = -kInf, values[5] = kNan;
    std::vector<float> residual(values.size(), 0.0F);
    const Coded result = coded(Codec(Compression::kInt8, level), values, residual.data());
    CHECK_EQUAL(result.decoded[3], kInf);
    CHECK_EQUAL(result.decoded[4], -kInf);
    CHECK(std::isnan(result.decoded[5]));
    for (size_t i = 0; i < values.size(); ++i) {
      CHECK(std::isfinite(residual[i]));
      if (i >= 3 && i <= 5) continue;
      CHECK(std::abs(result.decoded[i] - values[i]) <= 5.0F / 126.0F);  // no normal number here is beyond 5
    }
    float sum = 1.0F;
    Codec(Compression::kInt8, level).decode_add(result.bytes.data(), &sum, 1);
    CHECK(std::abs(sum - 1.0F - values[0]) <= 5.0F / 126.0F);
  }
}

TEST(int8_of_only_inf_or_nan_decodes_to_them) {
  const Coded result = coded(Codec(Compression::kInt8), {kInf, kNan, -kInf}, nullptr);
  CHECK_EQUAL(result.decoded[0], kInf);
  CHECK(std::isnan(result.decoded[1]));
  CHECK_EQUAL(result.decoded[2], -kInf);
}

TEST(int8_of_tiny_values_is_zero_and_the_residual_keeps_them) {
  const std::vector<float> values{1e-38F, -1e-45F, 3e-31F, 0.0F, -0.0F};
  std::vector<float> residual(values.size(), 0.0F);
  const Coded result = coded(Codec(Compression::kInt8), values, residual.data());
  for (size_t i = 0; i < values.size(); ++i) {
    CHECK_EQUAL(result.decoded[i], 0.0F);
    CHECK_EQUAL(residual[i], values[i]);
  }
}

TEST(int8_of_huge_values_stays_finite) {
  const float largest = std::numeric_limits<float>::max();
  const Coded result = coded(Codec(Compression::kInt8), {largest, -largest, 1e38F}, nullptr);
  for (const float value : result.decoded) CHECK(std::isfinite(value));
  CHECK(result.decoded[0] >= 1.7e38F && result.decoded[1] <= -1.7e38F);
}

TEST(what_is_decoded_and_the_residual_add_up_to_what_was_given) {
  for (const Compression compression : {Compression::kBFloat16, Compression::kInt8}) {
    const std::vector<float> values = random_values(2000, 6);
    std::vector<float> residual = random_values(2000, 7, 0.05F);
    const std::vector<float> before = residual;
    const Coded result = coded(Codec(compression), values, residual.data());
    for (size_t i = 0; i < values.size(); ++i) {
      const double given = static_cast<double>(values[i]) + before[i];
      const double kept = static_cast<double>(result.decoded[i]) + residual[i];
      CHECK(std::abs(given - kept) <= 6e-7);  // a few roundings of values below 5
    }
  }
}

TEST(with_error_feedback_the_mean_of_many_rounds_is_the_value) {
  // A value far below half a step of its block is never sent without feedback, and with it every so often.
  const std::vector<float> values{1.0F, 0.001F, -0.0017F};
  std::vector<float> residual(values.size(), 0.0F);
  std::vector<double> sums(values.size(), 0.0);
  constexpr int kRounds = 2000;
  for (int round = 0; round < kRounds; ++round) {
    const Coded result = coded(Codec(Compression::kInt8), values, residual.data());
    for (size_t i = 0; i < values.size(); ++i) sums[i] += static_cast<double>(result.decoded[i]);
  }
  // What is missing is the last residual, at most half a step (1/254), and the roundings of its updates.
  for (size_t i = 0; i < values.size(); ++i) {
    CHECK(std::abs(sums[i] - kRounds * static_cast<double>(values[i])) <= 1.0 / 254 + kRounds * 1e-7);
  }
  CHECK_EQUAL(coded(Codec(Compression::kInt8), values, nullptr).decoded[1], 0.0F);
}

TEST(decoding_divides_and_adds) {
  for (const Compression compression : {Compression::kBFloat16, Compression::kInt8}) {
    const Codec codec(compression);
    const std::vector<float> values = random_values(700, 8);
    const Coded result = coded(codec, values, nullptr);
    std::vector<float> divided(values.size()), added = values;
    codec.decode(result.bytes.data(), divided.data(), values.size(), 3.0F);
    codec.decode_add(result.bytes.data(), added.data(), values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      CHECK_EQUAL(divided[i], result.decoded[i] / 3.0F);
      CHECK_EQUAL(added[i], values[i] + result.decoded[i]);
    }
  }
}

TEST(encoded_sizes_shrink_as_promised) {
  CHECK_EQUAL(Codec(Compression::kBFloat16).encoded_bytes(1 << 20), size_t{2} << 20);
  CHECK_EQUAL(Codec(Compression::kInt8).encoded_bytes(1 << 20), (size_t{1} << 20) / 256 * 260);
  CHECK_EQUAL(Codec(Compression::kInt8).encoded_bytes(257), size_t{257 + 8});
  CHECK_EQUAL(Codec(Compression::kInt8).encoded_bytes(0), size_t{0});
}
