// The collectives whose slices have owners: compressed all-reduce, and the canonical tree over any layout.
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "check.h"
#include "comm/reduce/reducer.h"
#include "ranks.h"

namespace {

using namespace mlsys::comm;
using ranks::Rank;

constexpr std::chrono::milliseconds kDefault{0};
const std::vector<size_t> kCounts{0, 3, 257, 5003, 400009};
const std::vector<std::vector<int>> kLayouts{{0, 1},       {0, 1, 2},    {0, 0, 1},       {0, 1, 1},
                                             {0, 0, 1, 1}, {0, 1, 0, 1}, {0, 0, 0, 1},    {0, 1, 1, 0},
                                             {0, 1, 2, 3}, {0, 1, 1, 2}, {0, 0, 1, 1, 0}, {0, 0, 0, 1, 1, 1}};

std::vector<ranks::Job> jobs() {
  std::vector<ranks::Job> all{{.size = 1}, {.size = 3}, {.size = 4}};
  for (const std::vector<int>& layout : kLayouts) {
    all.push_back({.size = static_cast<int>(layout.size()), .locality = layout});
  }
  return all;
}

// 24-bit values of magnitudes below 2^17 spread over ten powers of two: their sums depend on the order.
float value(int rank, size_t index) {
  uint64_t mixed = (index + 1) * 0x9e3779b97f4a7c15U + static_cast<uint64_t>(rank) * 0xbf58476d1ce4e5b9U;
  mixed = (mixed ^ (mixed >> 29U)) * 0x94d049bb133111ebU;
  const auto mantissa = static_cast<float>(static_cast<int64_t>(mixed >> 40U) - (1 << 23));
  return std::ldexp(mantissa, -6 - static_cast<int>(mixed % 10));
}

std::shared_ptr<float> floats(Rank& r, size_t count, bool arena) {
  if (arena) return std::static_pointer_cast<float>(r.comm->allocate(count * sizeof(float)));
  auto whole = std::shared_ptr<float[]>(new float[count + 1]);
  return std::shared_ptr<float>(whole, whole.get() + 1);
}

void fill(float* data, int rank, size_t count, size_t first = 0) {
  for (size_t i = 0; i < count; ++i) data[i] = value(rank, first + i);
}

// The canonical tree over all ranks' values, by Reducer, whose order test_reduce.cpp checks.
std::vector<float> tree_sum(int size, size_t count, ReduceOp op = ReduceOp::kSum, size_t first = 0) {
  std::vector<std::vector<float>> inputs;
  std::vector<const void*> sources;
  for (int rank = 0; rank < size; ++rank) {
    fill(inputs.emplace_back(count).data(), rank, count, first);
    sources.push_back(inputs.back().data());
  }
  std::vector<float> result(count);
  void* target = result.data();
  Reducer({ElementType::kFloat32, op}, size).reduce(sources, {&target, 1}, count);
  return result;
}

bool same_bits(const float* left, const float* right, size_t count) {
  return count == 0 || std::memcmp(left, right, count * sizeof(float)) == 0;
}

template <class Body>
void everywhere(Body body) {
  for (const ranks::Job& job : jobs()) {
    ranks::run(job, [&](Rank& r) {
      for (const bool arena : {false, true}) {
        for (const size_t count : kCounts) body(r, count, arena);
      }
    });
  }
}

// Every rank's result has the bits of rank 0's.
void check_same_everywhere(Rank& r, const float* data, size_t count) {
  std::vector<float> first(data, data + count);
  r.comm->broadcast(first.data(), count * sizeof(float), 0, kDefault);
  CHECK(same_bits(first.data(), data, count));
}

}  // namespace

TEST(all_reduce_tree_has_the_bits_of_the_tree_on_every_layout) {
  everywhere([](Rank& r, size_t count, bool arena) {
    for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kAvg}) {
      const auto data = floats(r, count, arena);
      fill(data.get(), r.rank, count);
      r.comm->all_reduce_tree(data.get(), count, {ElementType::kFloat32, op}, kDefault);
      CHECK(same_bits(data.get(), tree_sum(r.size, count, op).data(), count));
    }
  });
}

TEST(reduce_scatter_tree_has_the_bits_of_the_tree_on_every_layout) {
  everywhere([](Rank& r, size_t count, bool arena) {
    count /= static_cast<size_t>(r.size);
    const auto input = floats(r, count * static_cast<size_t>(r.size), arena);
    fill(input.get(), r.rank, count * static_cast<size_t>(r.size));
    std::vector<const void*> inputs;
    for (int rank = 0; rank < r.size; ++rank)
      inputs.push_back(input.get() + static_cast<size_t>(rank) * count);
    // In place: the output is this rank's own part of its input.
    float* output = input.get() + static_cast<size_t>(r.rank) * count;
    r.comm->reduce_scatter_tree(inputs, output, count, {ElementType::kFloat32}, kDefault);
    const std::vector<float> expected =
        tree_sum(r.size, count, ReduceOp::kSum, static_cast<size_t>(r.rank) * count);
    CHECK(same_bits(output, expected.data(), count));
  });
}

TEST(the_tree_of_leaves_and_ranks_does_not_depend_on_the_number_of_ranks) {
  // Eight leaves, combined first by twos on four ranks: the bits of eight leaves combined at once.
  constexpr size_t kCount = 5003;
  for (const std::vector<int>& layout : {std::vector<int>{0, 0, 1, 1}, {0, 1, 0, 1}, {0, 0, 0, 1}}) {
    ranks::run({.size = 4, .locality = layout}, [&](Rank& r) {
      std::vector<float> left(kCount), right(kCount);
      fill(left.data(), 2 * r.rank, kCount);
      fill(right.data(), 2 * r.rank + 1, kCount);
      for (size_t i = 0; i < kCount; ++i) left[i] += right[i];
      r.comm->all_reduce_tree(left.data(), kCount, {ElementType::kFloat32}, kDefault);
      CHECK(same_bits(left.data(), tree_sum(8, kCount).data(), kCount));
    });
  }
}

TEST(the_ring_and_the_tree_differ_so_that_the_tests_above_can_fail) {
  ranks::run({.size = 4, .locality = {0, 1, 2, 3}}, [](Rank& r) {
    std::vector<float> data(300'007);  // few elements are summed in one hop, in rank order
    fill(data.data(), r.rank, data.size());
    r.comm->all_reduce(data.data(), data.size(), {ElementType::kFloat32}, kDefault);
    CHECK(!same_bits(data.data(), tree_sum(4, data.size()).data(), data.size()));
  });
}

TEST(half_precision_stays_fp32_up_to_the_root_of_the_tree) {
  ranks::run({.size = 4, .locality = {0, 1, 0, 1}}, [](Rank& r) {
    // 256 + 1 + 1 + 1 is 260 (to even) when rounded once; bf16 partial sums would stay at 256.
    std::vector<uint16_t> data(300, r.rank == 0 ? 0x4380 : 0x3f80);
    r.comm->all_reduce_tree(data.data(), data.size(), {ElementType::kBFloat16}, kDefault);
    for (const uint16_t bits : data) CHECK_EQUAL(bits, 0x4382);
  });
}

TEST(hosts_with_aligned_runs_send_no_more_than_reduce_scatter_and_all_gather) {
  constexpr size_t kCount = 1 << 18;
  ranks::run({.size = 4, .locality = {0, 0, 1, 1}}, [](Rank& r) {
    std::vector<float> data(kCount, 1.0F);
    r.comm->all_reduce_tree(data.data(), kCount, {ElementType::kFloat32}, kDefault);
    const uint64_t sent = r.comm->counters().tcp_bytes_sent;
    // A host n (H - 1) / H twice, of which each of its ranks a half; and descriptors.
    CHECK(sent >= kCount * 2 && sent < kCount * 2 + 1000);
  });
}

TEST(compressed_all_reduce_is_near_the_sum_with_the_same_bits_everywhere) {
  everywhere([](Rank& r, size_t count, bool arena) {
    for (const Compression compression : {Compression::kBFloat16, Compression::kInt8}) {
      for (const bool average : {false, true}) {
        const auto data = floats(r, count, arena);
        fill(data.get(), r.rank, count);
        r.comm->all_reduce_compressed(data.get(), count, average, compression, nullptr, kDefault);
        // Values are below 2^18. Each of at most 6 contributions and the result, below 6 * 2^17, loses at
        // most half a step: 1/254 of a block's largest in int8, 1/256 of the value in bf16.
        const double bound = (6 + 6) * 131072.0 / 254 / (average ? r.size : 1);
        const std::vector<float> exact = tree_sum(r.size, count, average ? ReduceOp::kAvg : ReduceOp::kSum);
        for (size_t i = 0; i < count; ++i) {
          CHECK(std::abs(static_cast<double>(data.get()[i]) - static_cast<double>(exact[i])) <= bound);
        }
        check_same_everywhere(r, data.get(), count);
      }
    }
  });
}

TEST(what_compression_has_not_delivered_is_the_sum_of_the_residuals) {
  for (const std::vector<int>& layout : kLayouts) {
    ranks::run({.size = static_cast<int>(layout.size()), .locality = layout}, [](Rank& r) {
      constexpr size_t kCount = 3001;
      constexpr int kRounds = 5;
      for (const Compression compression : {Compression::kBFloat16, Compression::kInt8}) {
        std::vector<float> residual(kCount, 0.0F), data(kCount);
        std::vector<double> delivered(kCount, 0.0);
        for (int round = 0; round < kRounds; ++round) {
          fill(data.data(), r.rank, kCount);
          r.comm->all_reduce_compressed(data.data(), kCount, false, compression, residual.data(), kDefault);
          for (size_t i = 0; i < kCount; ++i) delivered[i] += static_cast<double>(data[i]);
        }
        r.comm->all_reduce(residual.data(), kCount, {ElementType::kFloat32}, kDefault);
        const std::vector<float> exact = tree_sum(r.size, kCount);
        for (size_t i = 0; i < kCount; ++i) {
          const double wanted = kRounds * static_cast<double>(exact[i]);
          // Some 10 fp32 roundings a round of sums below 6 * 2^17 and their residuals.
          const double roundings = kRounds * 10 * 6 * 131072.0 * 6e-8;
          CHECK(std::abs(delivered[i] + static_cast<double>(residual[i]) - wanted) <= roundings);
        }
      }
    });
  }
}

TEST(inf_and_nan_of_any_rank_reach_every_rank) {
  for (const std::vector<int>& layout : {std::vector<int>{0, 1}, {0, 0, 1, 1}}) {
    ranks::run({.size = static_cast<int>(layout.size()), .locality = layout}, [](Rank& r) {
      for (const Compression compression : {Compression::kBFloat16, Compression::kInt8}) {
        std::vector<float> residual(1000, 0.0F), data(1000, 1.0F);
        // In slices of both hosts, so that both encodings see them.
        if (r.rank == r.size - 1) {
          data[5] = data[900] = std::numeric_limits<float>::quiet_NaN();
          data[6] = data[901] = -std::numeric_limits<float>::infinity();
        }
        r.comm->all_reduce_compressed(data.data(), data.size(), true, compression, residual.data(), kDefault);
        for (const size_t base : {size_t{5}, size_t{900}}) {
          CHECK(std::isnan(data[base]));
          CHECK_EQUAL(data[base + 1], -std::numeric_limits<float>::infinity());
          CHECK(std::abs(data[base + 2] - 1.0F) < 0.02F);
        }
        for (const float kept : residual) CHECK(std::isfinite(kept));
      }
    });
  }
}

TEST(compression_shrinks_the_bytes_between_hosts) {
  constexpr size_t kCount = 1 << 18;
  ranks::run({.size = 4, .locality = {0, 0, 1, 1}}, [](Rank& r) {
    std::vector<float> data(kCount, 1.0F);
    const auto sent_by = [&](auto call) {
      const uint64_t before = r.comm->counters().tcp_bytes_sent;
      call();
      return static_cast<double>(r.comm->counters().tcp_bytes_sent - before);
    };
    const auto compressed = [&](Compression compression) {
      return sent_by(
          [&] { r.comm->all_reduce_compressed(data.data(), kCount, false, compression, nullptr, kDefault); });
    };
    const double plain =
        sent_by([&] { r.comm->all_reduce(data.data(), kCount, {ElementType::kFloat32}, kDefault); });
    const double bf16 = compressed(Compression::kBFloat16), int8 = compressed(Compression::kInt8);
    // Every rank sends its share of what its host sends, to within 4 KiB in each half.
    CHECK(bf16 > 0.49 * plain && bf16 < 0.51 * plain);
    CHECK(std::abs(int8 - plain / 3.938) < 2 * 4096);
    std::array<double, 3> of_all{plain, bf16, int8};
    r.comm->all_reduce(of_all.data(), of_all.size(), {ElementType::kFloat64}, kDefault);
    CHECK(of_all[0] / of_all[1] > 1.99 && of_all[0] / of_all[1] < 2.01);
    CHECK(of_all[0] / of_all[2] > 3.9 && of_all[0] / of_all[2] < 4.0);
  });
}

TEST(ranks_that_compress_differently_are_told_so) {
  const auto outcomes = ranks::run_collecting({.size = 2, .locality = {0, 1}}, [](Rank& r) {
    std::vector<float> data(10, 1.0F);
    r.comm->all_reduce_compressed(data.data(), data.size(), false,
                                  r.rank == 0 ? Compression::kBFloat16 : Compression::kInt8, nullptr,
                                  kDefault);
  });
  bool told = false;
  for (const auto& outcome : outcomes) {
    CHECK(outcome.exit_code != 0);
    told |= outcome.error.find("to bf16") != std::string::npos &&
            outcome.error.find("to int8") != std::string::npos;
  }
  CHECK(told);
}
