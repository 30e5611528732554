#include "activation/table.h"

#include <algorithm>

#include "activation/table_kernel.h"
#include "core/simd_dispatch.h"

namespace mlsys::activation {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The groups of a part's row: from the least memory at which it runs to the least at which nothing is gained.
Row groups_of(const Interval& part, const MemoryBounds& bounds, int64_t cap) {
  const int64_t least = bounds.least(part.begin, part.end);
  const int64_t enough = std::min(bounds.enough(part.begin, part.end), cap);
  Row row;
  row.begin = least / kGroup;
  row.end = std::max(row.begin, enough / kGroup + 1);
  return row;
}

}  // namespace

int64_t Table::num_values(const Sharing& sharing, const MemoryBounds& bounds, int64_t cap) {
  int64_t total = 0;
  for (const Interval& part : sharing.examples) {
    const Row row = groups_of(part, bounds, cap);
    total += (row.end - row.begin + 2) * kGroup + row.end - row.begin + 1;
  }
  return total;
}

Table::Table(const SizedChain& chain, const Sharing& sharing, const MemoryBounds& bounds, int64_t cap,
             SimdLevel level)
    : chain_(chain), sharing_(sharing), level_(level) {
  int64_t num_values = 0, num_groups = 0, longest = 0;
  rows_.resize(sharing.examples.size());
  // The rows of one beginning lie one after the other, as the loop over middles reads them.
  std::vector<Interval> by_begin = sharing.examples;
  std::sort(by_begin.begin(), by_begin.end(), [](const Interval& left, const Interval& right) {
    return std::pair{left.begin, left.end} < std::pair{right.begin, right.end};
  });
  for (const Interval& part : by_begin) {
    Row row = groups_of(part, bounds, cap);
    row.values = num_values + kGroup;
    row.lowest = num_groups;
    num_values += (row.end - row.begin + 2) * kGroup;
    num_groups += row.end - row.begin + 1;
    longest = std::max(longest, row.end);
    rows_[static_cast<size_t>(sharing.problem(part.begin, part.end))] = row;
  }
  values_ = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(num_values));
  lowest_.resize(static_cast<size_t>(num_groups + 16));
  highest_.resize(static_cast<size_t>(longest + 16));
  zeros_.resize(static_cast<size_t>((longest + 1) * kGroup));
  for (const Interval& part : sharing.examples) fill(part, bounds);
}

void Table::relax_options(const Interval& part, const MemoryBounds& bounds, const Row& row) {
  const auto [i, j] = part;
  float* best = values_.get() + row.values;
  const int64_t first = row.begin * kGroup, last = row.end * kGroup;
  for (const SizedOption& option : chain_.blocks[static_cast<size_t>(i)].options) {
    const int64_t held = chain_.held(i, option, j);
    const int64_t peak = std::max(option.forward_peak + chain_.gradient(j), option.backward_peak);
    const int64_t from = std::max({peak, held + bounds.least(i + 1, j), first});
    const auto extra = static_cast<float>(option.extra_s);
    int64_t zero_from = held;
    if (i + 1 < j) {
      const Row& rest = rows_[static_cast<size_t>(sharing_.problem(i + 1, j))];
      zero_from = held + rest.end * kGroup;
      const int64_t shift = rest.values - rest.begin * kGroup - held;
      const float* values = values_.get();
      for (int64_t m = from; m < std::min(zero_from, last); ++m) {
        const float value = extra + values[m + shift];
        best[m - first] = value < best[m - first] ? value : best[m - first];
      }
    }
    for (int64_t m = std::max(from, zero_from); m < last; ++m) {
      best[m - first] = extra < best[m - first] ? extra : best[m - first];
    }
  }
}

void Table::fill(const Interval& part, const MemoryBounds& bounds) {
  const auto [i, j] = part;
  const Row& row = rows_[static_cast<size_t>(sharing_.problem(i, j))];
  const int64_t num_groups = row.end - row.begin;
  float* best = values_.get() + row.values;
  std::fill(best - kGroup, best + num_groups * kGroup, kInfinity);
  std::fill_n(best + num_groups * kGroup, kGroup, 0.0F);
  if (num_groups == 0) return;
  relax_options(part, bounds, row);
  for (int64_t g = 0; g < num_groups; ++g) highest_[static_cast<size_t>(g)] = best[g * kGroup];

  std::vector<Middle> middles;
  int64_t peak = 0;
  double drop_s = 0;
  const int last = chain_.last_middle(i, j);
  for (int k = i + 1; k <= last; ++k) {
    const SizedBlock& dropped = chain_.blocks[static_cast<size_t>(k) - 1];
    peak = std::max(peak, dropped.drop_peak + (k - 1 > i ? dropped.input : 0));
    drop_s += dropped.drop_s;
    const Row& front = rows_[static_cast<size_t>(sharing_.problem(i, k))];
    const Row& back = rows_[static_cast<size_t>(sharing_.problem(k, j))];
    middles.push_back({front.begin, front.end, front.values, front.lowest, back.begin, back.end, back.values,
                       back.lowest, chain_.blocks[static_cast<size_t>(k)].input, peak + chain_.gradient(j),
                       static_cast<float>(drop_s)});
  }
  const RelaxMiddles relax{values_.get(), lowest_.data(), zeros_.data(), best, highest_.data(), row.begin};
  run_simd(level_, relax, static_cast<const Middle*>(middles.data()), static_cast<int64_t>(middles.size()),
           row.end - 1);
  float* lowest = lowest_.data() + row.lowest;
  for (int64_t g = 0; g < num_groups; ++g) lowest[g] = best[g * kGroup + kGroup - 1];
}

}  // namespace mlsys::activation
