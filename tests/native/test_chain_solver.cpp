// The budget solver's table against its recurrence written down plainly, for every size of memory and on
// every instruction set. (Against a search over all schedules: tests/activation/test_solver.py.)
#include <limits>
#include <random>

#include "activation/chain_solver.h"
#include "activation/intervals.h"
#include "activation/table.h"
#include "check.h"

namespace {

using namespace mlsys;
using namespace mlsys::activation;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::vector<SimdLevel> levels() {
  std::vector<SimdLevel> all{SimdLevel::kScalar};
  if (simd_level() >= SimdLevel::kAvx2) all.push_back(SimdLevel::kAvx2);
  if (simd_level() >= SimdLevel::kAvx512) all.push_back(SimdLevel::kAvx512);
  return all;
}

// Whole numbers of seconds, so that float32 sums are exact. `kinds` different blocks, in any order, some
// with other borders.
Chain random_chain(uint32_t seed, int length, int kinds, int64_t largest, int64_t largest_input) {
  std::mt19937 generator(seed);
  const auto draw = [&](int64_t top) { return std::uniform_int_distribution<int64_t>(0, top)(generator); };
  Chain different, chain;
  for (int n = 0; n < kinds; ++n) {
    BlockCosts block{draw(largest_input), draw(9) != 0,      static_cast<double>(draw(20)),
                     draw(largest / 4),   draw(largest / 8), {}};
    for (int64_t options = 1 + draw(3); options > 0; --options) {
      const int64_t saved = draw(largest);
      block.options.push_back({static_cast<double>(draw(20)), static_cast<double>(draw(40)), saved,
                               saved + draw(largest / 4), saved + draw(largest / 4)});
    }
    different.push_back(block);
  }
  for (int n = 0; n < length; ++n) {
    chain.push_back(different[static_cast<size_t>(draw(kinds - 1))]);
    if (draw(9) == 0) chain.back().splittable = !chain.back().splittable;
    if (draw(9) == 0) chain.back().input_bytes = draw(largest_input);
    if (draw(9) == 0) chain.back().output_gradient_bytes = draw(largest / 8);
  }
  return chain;
}

// E(m, i, j) for all m up to `cap` and all parts, from right to left; see activation/table.h.
class PlainTable {
 public:
  PlainTable(const SizedChain& chain, int64_t cap) : cap_(cap), length_(chain.length()) {
    values_.assign(static_cast<size_t>((length_ + 1) * (length_ + 1) * (cap + 1)), 0.0);
    for (int i = length_ - 1; i >= 0; --i) {
      for (int j = i + 1; j <= length_; ++j) {
        for (int64_t m = 0; m <= cap; ++m) value(i, j, m) = best(chain, i, j, m);
      }
    }
  }
  double at(int i, int j, int64_t m) const {
    return m < 0 ? kInfinity : values_[static_cast<size_t>((i * (length_ + 1) + j) * (cap_ + 1) + m)];
  }

 private:
  double& value(int i, int j, int64_t m) {
    return values_[static_cast<size_t>((i * (length_ + 1) + j) * (cap_ + 1) + m)];
  }
  double best(const SizedChain& chain, int i, int j, int64_t m) const {
    double least = kInfinity;
    const auto block = [&](int k) -> const SizedBlock& { return chain.blocks[static_cast<size_t>(k)]; };
    for (const SizedOption& option : block(i).options) {
      const bool fits = m >= option.forward_peak + chain.gradient(j) && m >= option.backward_peak;
      const int64_t apart = i + 1 < j && !block(i + 1).splittable ? block(i + 1).input : 0;
      if (fits) least = std::min(least, option.extra_s + at(i + 1, j, m - option.saved - apart));
    }
    double dropped_s = 0;
    for (int k = i + 1; k < j; ++k) {
      const int64_t passing = k - 1 == i ? 0 : block(k - 1).input;
      if (m < chain.gradient(j) + passing + block(k - 1).drop_peak) break;
      dropped_s += block(k - 1).drop_s;
      least = std::min(least, dropped_s + at(k, j, m - block(k).input) + at(i, k, m));
      if (!block(k).splittable) break;
    }
    return least;
  }

  int64_t cap_;
  int length_;
  std::vector<double> values_;
};

void check_table(const Chain& chain, int64_t unit, int64_t more_than_enough) {
  const SizedChain sized = in_units(chain, unit);
  const Sharing sharing = find_equal_intervals(in_units(chain, 1));
  const MemoryBounds bounds = memory_bounds(sized, sharing);
  const int length = sized.length();
  const int64_t cap = bounds.enough(0, length) + more_than_enough;
  const PlainTable plain(sized, cap);
  for (const SimdLevel level : levels()) {
    const Table table(sized, sharing, bounds, cap, level);
    for (int i = 0; i < length; ++i) {
      for (int j = i + 1; j <= length; ++j) {
        CHECK(bounds.least(i, j) > cap || plain.at(i, j, bounds.least(i, j) - 1) == kInfinity);
        CHECK(bounds.least(i, j) > cap || plain.at(i, j, bounds.least(i, j)) < kInfinity);
        for (int64_t m = 0; m <= cap; ++m) {
          CHECK_EQUAL(static_cast<double>(table.at(i, j, m)), plain.at(i, j, m));
        }
      }
    }
  }
}

}  // namespace

TEST(chain_table_is_the_recurrence_for_every_part_size_and_instruction_set) {
  for (uint32_t seed = 0; seed < 12; ++seed) {
    check_table(random_chain(seed, 14, 14, 60, 12), 1, 20);     // many groups, inputs below a group
    check_table(random_chain(seed, 12, 12, 40, 70), 1, 0);      // inputs of several groups
    check_table(random_chain(seed, 24, 2, 20, 5), 1, 5);        // equal parts
    check_table(random_chain(seed, 10, 10, 4000, 900), 37, 3);  // rounded up to units
    check_table(random_chain(seed, 30, 30, 3, 1), 1, 1);        // everything within a group or two
  }
}

TEST(chain_table_up_to_a_smaller_size_has_the_same_values) {
  const Chain chain = random_chain(3, 20, 20, 60, 12);
  const SizedChain sized = in_units(chain, 1);
  const Sharing sharing = find_equal_intervals(sized);
  const MemoryBounds bounds = memory_bounds(sized, sharing);
  const Table whole(sized, sharing, bounds, bounds.enough(0, 20), simd_level());
  for (const int64_t cap : {int64_t{0}, int64_t{15}, int64_t{16}, int64_t{100}, bounds.least(0, 20)}) {
    const Table part(sized, sharing, bounds, cap, simd_level());
    for (int64_t m = 0; m <= cap; ++m) CHECK_EQUAL(part.at(0, 20, m), whole.at(0, 20, m));
    for (int64_t m = 0; m <= cap; ++m) CHECK_EQUAL(part.at(5, 11, m), whole.at(5, 11, m));
  }
}

TEST(chain_solver_gives_nothing_below_the_least_and_the_fastest_from_enough_on) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    const Chain chain = random_chain(seed, 30, 30, 1000, 200);
    const Solution bounds = solve(chain, {});
    const int64_t least = bounds.least_bytes, enough = bounds.enough_bytes;
    const Solution found = solve(chain, {least - 1, least, enough - 1, enough, 10 * enough}, 50);
    CHECK(found.schedules[0].steps.empty());
    CHECK_EQUAL(found.schedules[1].peak_bytes, least);
    CHECK(found.schedules[2].peak_bytes < enough);
    CHECK_EQUAL(found.schedules[3].peak_bytes, enough);
    CHECK_EQUAL(found.schedules[3].seconds, found.schedules[4].seconds);
    CHECK(found.schedules[2].seconds >= found.schedules[3].seconds);
  }
}

TEST(chain_solver_refuses_what_it_cannot_count_with) {
  const Chain good = random_chain(1, 3, 3, 10, 5);
  CHECK_THROWS(std::invalid_argument, solve({}, {}), "no block");
  CHECK_THROWS(std::invalid_argument, solve(good, {-1}), "-1 bytes");
  Chain bad = good;
  bad[1].options.clear();
  CHECK_THROWS(std::invalid_argument, solve(bad, {}), "block 1 has no option");
  bad = good;
  bad[2].options[0].backward_s = kInfinity;
  CHECK_THROWS(std::invalid_argument, solve(bad, {}), "block 2");
  bad = good;
  bad[0].drop_peak_bytes = -1;
  CHECK_THROWS(std::invalid_argument, solve(bad, {}), "block 0");
}
