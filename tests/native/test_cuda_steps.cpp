// The steps of the all-reduce between GPUs, run on the CPU for every block and thread of every rank, against
// csrc/comm/reduce: bit for bit, for odd sizes, unaligned tensors, inf and nan.
#include <cmath>
#include <limits>
#include <random>

#include "check.h"
#include "comm/cuda/steps.h"
#include "comm/reduce/reducer.h"

namespace {

using namespace mlsys;
using namespace mlsys::comm;
using namespace mlsys::comm::cuda;

template <class T>
constexpr ElementType kType = ElementType::kFloat32;
template <>
constexpr ElementType kType<Float16> = ElementType::kFloat16;
template <>
constexpr ElementType kType<BFloat16> = ElementType::kBFloat16;

// Values whose sums need rounding, with a few that overflow fp16, infinities and nan.
template <class T>
std::vector<T> random_values(size_t count, uint32_t seed) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const float special[] = {kInf, -kInf, std::numeric_limits<float>::quiet_NaN(), 60000.0F, 1e-7F, -0.0F};
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0F, 3.0F);
  std::vector<T> values(count);
  for (T& value : values) {
    const bool is_special = generator() % 16 == 0;
    value = rounded(is_special ? special[generator() % 6] : normal(generator), T{});
  }
  return values;
}

// One rank's tensor, `offset` elements after an aligned address, and what it shares, with guards behind.
template <class T>
struct Rank {
  Rank(size_t count, size_t offset, int size, uint32_t seed)
      : memory(count + offset + Pack<T>::kLanes + 1), values(random_values<T>(count, seed)) {
    const auto base = reinterpret_cast<uintptr_t>(memory.data());
    const size_t skip = (kPackBytes - base % kPackBytes) % kPackBytes / sizeof(T) + offset;
    tensor = {memory.data() + skip, static_cast<int64_t>(count), offset * sizeof(T) % kPackBytes == 0};
    std::copy(values.begin(), values.end(), tensor.data);
    staged.resize(static_cast<size_t>(tensor.num_packs()));
    results.resize(static_cast<size_t>(slice_packs(tensor.num_packs(), size)));
  }

  std::vector<T> memory;
  std::vector<T> values;
  Elements<T> tensor;
  std::vector<Pack<T>> staged, results;
};

// Runs one step of every rank to its end, as the waits between steps guarantee.
template <class T, class Step>
void run_step(std::vector<Rank<T>>& ranks, int num_lanes, Step step) {
  for (size_t me = 0; me < ranks.size(); ++me) {
    Shared shared{};
    shared.rank = static_cast<int>(me);
    shared.size = static_cast<int>(ranks.size());
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
      shared.staged[rank] = reinterpret_cast<std::byte*>(ranks[rank].staged.data());
      shared.results[rank] = reinterpret_cast<std::byte*>(ranks[rank].results.data());
    }
    for (int lane = num_lanes - 1; lane >= 0; --lane) step(ranks[me].tensor, shared, Lane{lane, num_lanes});
  }
}

template <class T>
void all_reduce(std::vector<Rank<T>>& ranks, int num_lanes, bool two_shot, bool average) {
  using Tensor = const Elements<T>&;
  using Peers = const Shared&;
  if (two_shot) {
    run_step(ranks, num_lanes, [](Tensor t, Peers s, Lane l) { two_shot_stage(t, s, l); });
    run_step(ranks, num_lanes, [&](Tensor t, Peers s, Lane l) { two_shot_reduce(t, s, l, average); });
    run_step(ranks, num_lanes, [](Tensor t, Peers s, Lane l) { two_shot_gather(t, s, l); });
  } else {
    run_step(ranks, num_lanes, [](Tensor t, Peers s, Lane l) { one_shot_stage(t, s, l); });
    run_step(ranks, num_lanes, [&](Tensor t, Peers s, Lane l) { one_shot_reduce(t, s, l, average); });
  }
}

// Equal bits, but any nan for a nan: which of two nans an addition keeps is the compiler's choice.
template <class T>
bool same(T left, T right) {
  if (std::isnan(to_float(left))) return std::isnan(to_float(right));
  return std::memcmp(&left, &right, sizeof(T)) == 0;
}

template <class T>
void compare(int size, size_t count, size_t offset, bool two_shot, bool average) {
  std::vector<Rank<T>> ranks;
  for (int rank = 0; rank < size; ++rank) {
    ranks.emplace_back(count, offset, size, static_cast<uint32_t>(100 * rank) + static_cast<uint32_t>(count));
  }
  std::vector<const void*> sources;
  for (const auto& rank : ranks) sources.push_back(rank.values.data());
  std::vector<T> expected(count);
  void* const destination = expected.data();
  const Reduction reduction{kType<T>, average ? ReduceOp::kAvg : ReduceOp::kSum};
  Reducer(reduction, size).reduce(sources, std::span(&destination, 1), count);
  all_reduce(ranks, count > 100 ? 37 : 3, two_shot, average);
  for (const auto& rank : ranks) {
    for (size_t i = 0; i < count; ++i) {
      if (!same(rank.tensor.data[i], expected[i])) {
        check::fail(__FILE__, __LINE__,
                    std::to_string(size) + " ranks, element " + std::to_string(i) + " of " +
                        std::to_string(count) + ": " + std::to_string(to_float(rank.tensor.data[i])) +
                        " instead of " + std::to_string(to_float(expected[i])));
      }
    }
    for (const T& beyond : rank.memory) {
      const T* at = &beyond;
      if (at >= rank.tensor.data && at < rank.tensor.data + count) continue;
      CHECK(to_float(beyond) == 0.0F);  // nothing is written beside the tensor
    }
  }
}

template <class T>
void compare_all() {
  for (int size = 2; size <= kMostRanks; ++size) {
    for (const size_t count : {size_t{0}, size_t{1}, size_t{7}, size_t{8}, size_t{33}, size_t{4099}}) {
      for (const size_t offset : {size_t{0}, size_t{1}}) {
        for (const bool two_shot : {false, true}) {
          for (const bool average : {false, true}) compare<T>(size, count, offset, two_shot, average);
        }
      }
    }
  }
}

}  // namespace

TEST(gpu_steps_give_the_bits_of_the_cpu_in_fp32) { compare_all<float>(); }
TEST(gpu_steps_give_the_bits_of_the_cpu_in_fp16) { compare_all<Float16>(); }
TEST(gpu_steps_give_the_bits_of_the_cpu_in_bf16) { compare_all<BFloat16>(); }

TEST(gpu_slices_cover_every_pack_once) {
  for (int size = 1; size <= kMostRanks; ++size) {
    for (int64_t packs = 0; packs < 50; ++packs) {
      int64_t covered = 0;
      for (int owner = 0; owner < size; ++owner) {
        const int64_t num = packs_in_slice(packs, size, owner);
        CHECK(num <= slice_packs(packs, size));
        if (num > 0) CHECK_EQUAL(covered, slice_packs(packs, size) * owner);
        covered += num;
      }
      CHECK_EQUAL(covered, packs);
    }
  }
}
