// The element loops against plain references: every type and operation, every instruction set, odd sizes, NaN
// and inf.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "check.h"
#include "comm/reduce/kernels.h"
#include "comm/reduce/reducer.h"
#include "core/dtype.h"
#include "core/half.h"
#include "ranks.h"

namespace {

using namespace mlsys;
using namespace mlsys::comm;

const std::vector<ReduceOp> kFloating{ReduceOp::kSum, ReduceOp::kAvg, ReduceOp::kProduct,
                                      ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kPremulSum};
const std::vector<ReduceOp> kIntegral{ReduceOp::kSum,    ReduceOp::kProduct, ReduceOp::kMin,   ReduceOp::kMax,
                                      ReduceOp::kBitAnd, ReduceOp::kBitOr,   ReduceOp::kBitXor};

std::vector<SimdLevel> levels() {
  std::vector<SimdLevel> all{SimdLevel::kScalar};
  if (simd_level() >= SimdLevel::kAvx2) all.push_back(SimdLevel::kAvx2);
  if (simd_level() >= SimdLevel::kAvx512) all.push_back(SimdLevel::kAvx512);
  return all;
}

// Accumulates in T, the accumulator type, in the tree order that reducer.h promises.
template <class T, class Combine>
T tree(std::vector<T> values, Combine combine) {
  while (values.size() > 1) {
    std::vector<T> above;
    for (size_t i = 0; i < values.size(); i += 2) {
      above.push_back(i + 1 < values.size() ? combine(values[i], values[i + 1]) : values[i]);
    }
    values = above;
  }
  return values[0];
}

template <class T>
T combined(ReduceOp op, T a, T b) {
  switch (op) {
    case ReduceOp::kProduct:
      return a * b;
    case ReduceOp::kMin:
      return std::isnan(a) || std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : std::min(a, b);
    case ReduceOp::kMax:
      return std::isnan(a) || std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : std::max(a, b);
    default:
      return a + b;
  }
}

template <class T>
bool same(T a, T b) {
  return (std::isnan(a) && std::isnan(b)) || a == b;
}

float value_at(std::mt19937& random, size_t i) {
  if (i % 97 == 13) return std::numeric_limits<float>::infinity();
  if (i % 97 == 14) return -std::numeric_limits<float>::infinity();
  if (i % 97 == 15) return std::numeric_limits<float>::quiet_NaN();
  return std::normal_distribution<float>()(random);
}

// Raw <-> accumulator for the reference.
template <class Raw>
struct As {
  using Acc = Raw;
  static Raw raw(float v) { return static_cast<Raw>(v); }
  static Acc acc(Raw v) { return v; }
  static Raw rounded(Acc v) { return v; }
};
template <>
struct As<BFloat16> {
  using Acc = float;
  static BFloat16 raw(float v) { return to_bfloat16(v); }
  static float acc(BFloat16 v) { return to_float(v); }
  static BFloat16 rounded(float v) { return to_bfloat16(v); }
};
template <>
struct As<Float16> {
  using Acc = float;
  static Float16 raw(float v) { return to_float16(v); }
  static float acc(Float16 v) { return to_float(v); }
  static Float16 rounded(float v) { return to_float16(v); }
};

template <class Raw>
void check_floating(ElementType dtype) {
  using A = As<Raw>;
  using Acc = typename A::Acc;
  std::mt19937 random(7);
  for (const ReduceOp op : kFloating) {
    for (const size_t ranks : {1, 2, 3, 4, 5, 6, 7, 8, 11}) {
      const Reducer reducer({dtype, op, 0.375}, static_cast<int>(ranks));
      for (const size_t count : {0, 1, 17, 1024, 2500}) {
        std::vector<std::vector<Raw>> inputs(ranks);
        std::vector<const void*> sources;
        for (auto& input : inputs) {
          for (size_t i = 0; i < count; ++i) input.push_back(A::raw(value_at(random, i)));
          sources.push_back(input.data());
        }
        std::vector<Raw> one(count), two(count);
        reducer.reduce(sources, std::array<void*, 2>{one.data(), two.data()}, count);
        for (size_t i = 0; i < count; ++i) {
          std::vector<Acc> leaves;
          for (const auto& input : inputs) {
            leaves.push_back(op == ReduceOp::kPremulSum ? A::acc(input[i]) * static_cast<Acc>(0.375)
                                                        : A::acc(input[i]));
          }
          Acc expected = tree<Acc>(leaves, [op](Acc a, Acc b) { return combined(op, a, b); });
          if (op == ReduceOp::kAvg) expected /= static_cast<Acc>(ranks);
          CHECK(same<Acc>(A::acc(one[i]), A::acc(A::rounded(expected))));
          CHECK(same<Acc>(A::acc(two[i]), A::acc(one[i])));
        }
      }
    }
  }
}

template <class T>
void check_integral(ElementType dtype) {
  std::mt19937 random(11);
  for (const ReduceOp op : kIntegral) {
    for (const size_t ranks : {1, 2, 3, 5}) {
      const Reducer reducer({dtype, op}, static_cast<int>(ranks));
      const size_t count = 1531;
      std::vector<std::vector<T>> inputs(ranks, std::vector<T>(count));
      std::vector<const void*> sources;
      for (auto& input : inputs) {
        for (T& value : input) value = static_cast<T>(random());
        sources.push_back(input.data());
      }
      std::vector<T> result(count);
      reducer.reduce(sources, std::array<void*, 1>{result.data()}, count);
      for (size_t i = 0; i < count; ++i) {
        T expected = inputs[0][i];
        for (size_t rank = 1; rank < ranks; ++rank) {
          const T other = inputs[rank][i];
          const auto a = static_cast<uint64_t>(expected), b = static_cast<uint64_t>(other);
          if (op == ReduceOp::kSum) expected = static_cast<T>(a + b);
          if (op == ReduceOp::kProduct) expected = static_cast<T>(a * b);
          if (op == ReduceOp::kMin) expected = std::min(expected, other);
          if (op == ReduceOp::kMax) expected = std::max(expected, other);
          if (op == ReduceOp::kBitAnd) expected = static_cast<T>(a & b);
          if (op == ReduceOp::kBitOr) expected = static_cast<T>(a | b);
          if (op == ReduceOp::kBitXor) expected = static_cast<T>(a ^ b);
        }
        CHECK(result[i] == expected);
      }
    }
  }
}

}  // namespace

TEST(floating_reductions_match_the_reference_bit_for_bit) {
  check_floating<float>(ElementType::kFloat32);
  check_floating<double>(ElementType::kFloat64);
  check_floating<BFloat16>(ElementType::kBFloat16);
  check_floating<Float16>(ElementType::kFloat16);
}

TEST(integer_reductions_match_the_reference_and_wrap) {
  check_integral<int8_t>(ElementType::kInt8);
  check_integral<uint8_t>(ElementType::kUInt8);
  check_integral<int16_t>(ElementType::kInt16);
  check_integral<int32_t>(ElementType::kInt32);
  check_integral<int64_t>(ElementType::kInt64);
}

TEST(boolean_sum_is_or_and_product_is_and) {
  const std::vector<uint8_t> a{0, 0, 1, 1}, b{0, 1, 0, 1};
  const std::vector<const void*> sources{a.data(), b.data()};
  std::vector<uint8_t> result(4);
  Reducer({ElementType::kBool, ReduceOp::kSum}, 2).reduce(sources, std::array<void*, 1>{result.data()}, 4);
  CHECK((result == std::vector<uint8_t>{0, 1, 1, 1}));
  Reducer({ElementType::kBool, ReduceOp::kProduct}, 2)
      .reduce(sources, std::array<void*, 1>{result.data()}, 4);
  CHECK((result == std::vector<uint8_t>{0, 0, 0, 1}));
}

TEST(every_instruction_set_gives_the_same_bits) {
  std::mt19937 random(3);
  for (const ElementType dtype : {ElementType::kFloat32, ElementType::kFloat64, ElementType::kFloat16,
                                  ElementType::kBFloat16, ElementType::kInt8, ElementType::kInt64}) {
    const bool floating = dtype != ElementType::kInt8 && dtype != ElementType::kInt64;
    for (const ReduceOp op : floating ? kFloating : kIntegral) {
      const size_t count = 777, bytes = count * size_of(static_cast<DType>(dtype));
      std::vector<uint8_t> left(bytes), right(bytes), expected(bytes), result(bytes);
      for (uint8_t& byte : left) byte = static_cast<uint8_t>(random());
      for (uint8_t& byte : right) byte = static_cast<uint8_t>(random());
      kernels_for(dtype, op, SimdLevel::kScalar)
          .reduce_pair(left.data(), right.data(), expected.data(), count);
      for (const SimdLevel level : levels()) {
        kernels_for(dtype, op, level).reduce_pair(left.data(), right.data(), result.data(), count);
        size_t differing = 0;
        for (size_t i = 0; i < bytes; ++i) differing += result[i] != expected[i];
        // The payload of a NaN born from two NaNs depends on operand order, which compilers may choose.
        if (differing != 0 && floating) continue;
        CHECK_EQUAL(differing, size_t{0});
      }
    }
  }
}

TEST(a_destination_may_be_one_of_the_sources) {
  for (const size_t ranks : {2, 3}) {
    const Reducer reducer({ElementType::kFloat32}, static_cast<int>(ranks));
    std::vector<std::vector<float>> buffers(ranks, std::vector<float>(3001));
    std::vector<const void*> sources;
    std::vector<void*> destinations;
    for (size_t rank = 0; rank < ranks; ++rank) {
      for (size_t i = 0; i < buffers[rank].size(); ++i) buffers[rank][i] = static_cast<float>(i + rank);
      sources.push_back(buffers[rank].data());
      destinations.push_back(buffers[rank].data());
    }
    reducer.reduce(sources, destinations, 3001);
    for (const auto& buffer : buffers) {
      for (size_t i = 0; i < buffer.size(); ++i)
        CHECK_EQUAL(buffer[i], static_cast<float>(ranks * i + ranks * (ranks - 1) / 2));
    }
  }
}

TEST(reductions_that_a_type_does_not_have_are_refused) {
  CHECK_THROWS(std::invalid_argument, Reducer({ElementType::kInt64, ReduceOp::kAvg}, 2),
               "Convert to a floating-point type");
  CHECK_THROWS(std::invalid_argument, Reducer({ElementType::kInt32, ReduceOp::kPremulSum}, 2),
               "premul-sum of int32");
  CHECK_THROWS(std::invalid_argument, Reducer({ElementType::kFloat32, ReduceOp::kBitXor}, 2),
               "bit-xor of float32");
}

// Random values, so that another order of summation would show: all ranks, and arena and private memory,
// agree to the last bit on every topology; on one host the result is the tree of reducer.h.
TEST(all_reduce_gives_the_same_bits_on_all_ranks_and_for_arena_and_private_memory) {
  for (const ranks::Job& job : ranks::topologies()) {
    ranks::run(job, [&](ranks::Rank& r) {
      for (const size_t count : {50, 5000, 300007}) {
        std::mt19937 random(static_cast<unsigned>(r.rank) + 1);
        std::vector<float> data(count);
        for (float& value : data) value = std::normal_distribution<float>()(random);
        const auto shared = std::static_pointer_cast<float>(r.comm->allocate(count * sizeof(float)));
        std::copy(data.begin(), data.end(), shared.get());
        std::vector<std::vector<float>> inputs(static_cast<size_t>(r.size), std::vector<float>(count));
        std::vector<void*> everyone;
        for (auto& input : inputs) everyone.push_back(input.data());
        r.comm->all_gather(data.data(), everyone, count * sizeof(float), {});
        r.comm->all_reduce(data.data(), count, {ElementType::kFloat32}, {});
        r.comm->all_reduce(shared.get(), count, {ElementType::kFloat32}, {});
        CHECK(std::memcmp(data.data(), shared.get(), count * sizeof(float)) == 0);
        for (size_t i = 0; i < count; ++i) {
          std::vector<float> leaves;
          double exact = 0, magnitude = 0;
          for (const auto& input : inputs) {
            leaves.push_back(input[i]);
            exact += static_cast<double>(input[i]);
            magnitude += std::abs(static_cast<double>(input[i]));
          }
          if (job.locality.empty())
            CHECK_EQUAL(data[i], tree<float>(leaves, [](float a, float b) { return a + b; }));
          // size - 1 additions, each off by at most half a unit in the last place of a partial sum.
          CHECK(std::abs(static_cast<double>(data[i]) - exact) <=
                magnitude * (r.size - 1) * std::ldexp(1.0, -24) * 1.0001);
        }
        for (auto& input : inputs) std::fill(input.begin(), input.end(), 0.0F);
        r.comm->all_gather(data.data(), everyone, count * sizeof(float), {});
        for (const auto& input : inputs)
          CHECK(std::memcmp(data.data(), input.data(), count * sizeof(float)) == 0);
      }
    });
  }
}

// fp16 and bf16 are summed in fp32 over all ranks and rounded once, on every topology.
TEST(half_precision_is_rounded_once) {
  for (const ranks::Job& job : ranks::topologies()) {
    ranks::run(job, [&](ranks::Rank& r) {
      // 256 + 1 + 1 + ...: in bf16 every addition of 1 alone would be lost.
      for (const size_t count : {10, 100000}) {
        std::vector<BFloat16> data(count, to_bfloat16(r.rank == 0 ? 256.0F : 1.0F));
        r.comm->all_reduce(data.data(), count, {ElementType::kBFloat16}, {});
        const float expected = to_float(to_bfloat16(256.0F + static_cast<float>(r.size - 1)));
        for (const BFloat16 value : data) CHECK_EQUAL(to_float(value), expected);
        std::vector<Float16> average(count, to_float16(static_cast<float>(r.rank)));
        r.comm->all_reduce(average.data(), count, {ElementType::kFloat16, ReduceOp::kAvg}, {});
        const float mean =
            to_float(to_float16(static_cast<float>(r.size * (r.size - 1) / 2) / static_cast<float>(r.size)));
        for (const Float16 value : average) CHECK_EQUAL(to_float(value), mean);
        std::vector<BFloat16> parts(count * static_cast<size_t>(r.size),
                                    to_bfloat16(r.rank == 0 ? 256.0F : 1.0F)),
            part(count);
        std::vector<const void*> inputs;
        for (int rank = 0; rank < r.size; ++rank)
          inputs.push_back(parts.data() + static_cast<size_t>(rank) * count);
        r.comm->reduce_scatter(inputs, part.data(), count, {ElementType::kBFloat16}, {});
        for (const BFloat16 value : part) CHECK_EQUAL(to_float(value), expected);
      }
    });
  }
}
