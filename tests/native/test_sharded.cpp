// The sharded updates on every topology, with uneven and empty parts, in the arena and out of it, against
// sums of small integers, which are exact in every order.
#include <cmath>
#include <vector>

#include "check.h"
#include "optim/launch.h"
#include "optim/tile_step.h"
#include "ranks.h"

namespace {

using mlsys::comm::Communicator;
using mlsys::comm::ElementType;
using mlsys::comm::Reduction;
using ranks::Rank;

constexpr std::chrono::milliseconds kDefault{0};
constexpr size_t kCount = 70001;
const Reduction kSum{ElementType::kFloat32};

std::shared_ptr<float> floats(Rank& r, size_t count, bool arena) {
  if (arena) return std::static_pointer_cast<float>(r.comm->allocate(count * sizeof(float)));
  return std::shared_ptr<float>(new float[count], std::default_delete<float[]>());
}

float value(int rank, size_t index) {
  return static_cast<float>((index * 7 + static_cast<size_t>(rank) * 13) % 101) - 50.0F;
}

float sum_at(int size, size_t index) {
  float sum = 0;
  for (int rank = 0; rank < size; ++rank) sum += value(rank, index);
  return sum;
}

// Two rows with a gap: a small one that only the last rank owns, and one of growing parts of odd sizes.
std::vector<size_t> partition_of(size_t size) {
  std::vector<size_t> bounds(size, 3);
  bounds.push_back(17);
  const size_t weights = size * (size + 1) / 2;
  for (size_t rank = 0; rank <= size; ++rank) {
    bounds.push_back(100 + (kCount - 100) * (rank * (rank + 1) / 2) / weights);
  }
  return bounds;
}

size_t owner_of(const std::vector<size_t>& bounds, size_t size, size_t index) {
  for (size_t row = 0; row < bounds.size(); row += size + 1) {
    for (size_t rank = 0; rank < size; ++rank) {
      if (bounds[row + rank] <= index && index < bounds[row + rank + 1]) return rank;
    }
  }
  return size;
}

template <class Body>
void everywhere(Body body) {
  for (const ranks::Job& job : ranks::topologies()) {
    ranks::run(job, [&](Rank& r) {
      body(r, true);
      body(r, false);
      body(r, r.rank == 0);  // mixed
    });
  }
}

}  // namespace

TEST(reduce_shard_sums_what_a_rank_owns_and_shows_it_in_order) {
  everywhere([](Rank& r, bool arena) {
    const auto size = static_cast<size_t>(r.size);
    const auto data = floats(r, kCount, arena);
    for (size_t i = 0; i < kCount; ++i) data.get()[i] = value(r.rank, i);
    const auto bounds = partition_of(size);
    size_t seen = 0, last = 0;
    r.comm->reduce_shard(
        data.get(), kCount, kSum, bounds,
        [&](const void* reduced, size_t first, size_t count) {
          CHECK(first >= last && count > 0);
          CHECK_EQUAL(static_cast<const float*>(reduced)[0], sum_at(r.size, first));
          last = first + count;
          seen += count;
        },
        kDefault);
    size_t owned = 0;
    for (size_t i = 0; i < kCount; ++i) {
      const bool mine = owner_of(bounds, size, i) == static_cast<size_t>(r.rank);
      owned += mine;
      CHECK_EQUAL(data.get()[i], mine ? sum_at(r.size, i) : value(r.rank, i));
    }
    CHECK_EQUAL(seen, owned);
  });
}

TEST(the_fused_step_gives_every_rank_what_each_makes_of_its_part) {
  everywhere([](Rank& r, bool arena) {
    const auto size = static_cast<size_t>(r.size);
    const auto bounds = partition_of(size);
    for (const bool is_reduced : {false, true}) {
      const auto gradients = floats(r, kCount, arena), parameters = floats(r, kCount, arena);
      for (size_t i = 0; i < kCount; ++i) {
        gradients.get()[i] = is_reduced ? sum_at(r.size, i) : value(r.rank, i);
        parameters.get()[i] = 1000.0F;
      }
      r.comm->reduce_scatter_optimize_all_gather(
          gradients.get(), parameters.get(), kCount, kSum, bounds, is_reduced,
          [&](const void* reduced, size_t first, size_t count) {
            for (size_t i = 0; i < count; ++i) {
              parameters.get()[first + i] +=
                  2.0F * static_cast<const float*>(reduced)[i] + static_cast<float>(r.rank);
            }
          },
          kDefault);
      for (size_t i = 0; i < kCount; ++i) {
        const size_t owner = owner_of(bounds, size, i);
        const float expected =
            owner == size ? 1000.0F : 1000.0F + 2.0F * sum_at(r.size, i) + static_cast<float>(owner);
        CHECK_EQUAL(parameters.get()[i], expected);
        CHECK_EQUAL(gradients.get()[i], is_reduced ? sum_at(r.size, i) : value(r.rank, i));
      }
    }
  });
}

TEST(a_partition_that_does_not_fit_is_refused_before_anything_is_sent) {
  ranks::run({.size = 2}, [](Rank& r) {
    const auto data = floats(r, 10, true);
    const auto nothing = [](const void*, size_t, size_t) {};
    for (const std::vector<size_t>& bounds :
         std::vector<std::vector<size_t>>{{0, 5}, {0, 6, 5}, {0, 5, 11}, {4, 5, 6, 0, 1, 2}}) {
      CHECK_THROWS(std::invalid_argument,
                   r.comm->reduce_shard(data.get(), 10, kSum, bounds, nothing, kDefault),
                   "ascending offsets");
    }
    r.comm->reduce_shard(data.get(), 10, kSum, std::vector<size_t>{}, nothing, kDefault);
  });
}

TEST(a_tile_step_gives_the_bits_of_the_whole_step_however_tiles_cut_the_segments) {
  using mlsys::Segment;
  constexpr int64_t kNumel = 9001;
  const double hyper[2][mlsys::kHyperColumns] = {{1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0},
                                                 {3e-2, 0.8, 0.99, 1e-6, 0.0, -1.0}};
  const float steps[2] = {3.0F, 1.0F};
  const auto train = [&](int64_t tile) {
    std::vector<float> param(kNumel, 1.0F), grad(kNumel), first(kNumel, 0.25F), second(kNumel, 0.5F);
    for (int64_t i = 0; i < kNumel; ++i)
      grad[static_cast<size_t>(i)] = value(1, static_cast<size_t>(i)) / 7.0F;
    const auto at = [](auto& values, int64_t index) {
      return static_cast<int64_t>(reinterpret_cast<uintptr_t>(values.data() + index));
    };
    // Elements 4000 to 4031 belong to no segment.
    const auto segment = [&](int64_t first_element, int64_t numel, int64_t row) {
      Segment result{};
      result.param = at(param, first_element);
      result.grad = at(grad, first_element);
      result.state[0] = at(first, first_element);
      result.state[1] = at(second, first_element);
      result.numel = numel;
      result.first_chunk = result.hyper_row = result.step_index = row;
      return result;
    };
    const Segment segments[2] = {segment(0, 4000, 0), segment(4032, kNumel - 4032, 1)};
    const mlsys::StepArguments arguments{segments, 2, hyper[0], steps, 0.5, mlsys::run_inline};
    if (tile == 0) {
      mlsys::adamw_step(arguments);
    } else {
      const auto step = mlsys::make_tile_step("adamw", arguments);
      for (int64_t done = 0; done < kNumel; done += tile) {
        step->step(grad.data() + done, param.data() + done, std::min(tile, kNumel - done));
      }
    }
    param.insert(param.end(), first.begin(), first.end());
    param.insert(param.end(), second.begin(), second.end());
    return param;
  };
  const auto whole = train(0);
  CHECK_EQUAL(whole[4001], 1.0F);
  CHECK(whole[3999] != 1.0F && whole[4032] != 1.0F);
  for (const int64_t tile : {64, 1000, 4000, 4096, 20000}) CHECK(train(tile) == whole);
}

TEST(an_unknown_rule_has_no_tile_step) { CHECK(mlsys::make_tile_step("lamb", {}) == nullptr); }
