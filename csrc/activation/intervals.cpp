#include "activation/intervals.h"

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <tuple>
#include <unordered_map>

namespace mlsys::activation {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max() / 4;

// Numbers the blocks so that equal numbers mean equal costs (the input apart: it belongs to the border).
std::vector<int64_t> kinds_of(const SizedChain& chain) {
  using Option = std::tuple<int64_t, int64_t, int64_t, double>;
  std::map<std::tuple<int64_t, double, std::vector<Option>>, int64_t> known;
  std::vector<int64_t> kinds;
  for (const SizedBlock& block : chain.blocks) {
    std::vector<Option> options;
    for (const SizedOption& o : block.options) {
      options.emplace_back(o.saved, o.forward_peak, o.backward_peak, o.extra_s);
    }
    const auto next = static_cast<int64_t>(known.size());
    kinds.push_back(
        known.try_emplace({block.drop_peak, block.drop_s, std::move(options)}, next).first->second);
  }
  return kinds;
}

struct HashThree {
  size_t operator()(const std::array<int64_t, 3>& key) const {
    uint64_t hash = 0;
    for (const int64_t part : key)
      hash = (hash ^ static_cast<uint64_t>(part)) * 0x9E3779B97F4A7C15U ^ hash >> 29;
    return hash;
  }
};

// All parts, in an order in which (k, j) and (i, k) come before (i, j) for every k in between. It takes some
// beginnings together, end by end: the rows of the parts (k, j), which lie far apart in the table, are then
// used by all of them while they are in the cache. (From 1 to 8 beginnings: twice as fast for 400 blocks.)
std::vector<Interval> in_strips(int length) {
  constexpr int kStrip = 8;
  std::vector<Interval> parts;
  for (int strip = (length - 1) / kStrip; strip >= 0; --strip) {
    for (int j = strip * kStrip + 1; j <= length; ++j) {
      for (int i = std::min((strip + 1) * kStrip, j) - 1; i >= strip * kStrip; --i) parts.push_back({i, j});
    }
  }
  return parts;
}

}  // namespace

// A part is known by its first block, the border behind that block (what is stored there, and what waits when
// the blocks behind it are done), and the part that follows; the empty part
// by the gradient that waits at its end. So equal parts get equal numbers from right to left.
Sharing find_equal_intervals(const SizedChain& in_bytes) {
  const int length = in_bytes.length();
  Sharing sharing{PerInterval<int32_t>(length, -1), {}};
  const std::vector<int64_t> kinds = kinds_of(in_bytes);
  std::map<std::tuple<int64_t, bool, int64_t>, int64_t> borders;
  std::map<int64_t, int64_t> ends;
  std::unordered_map<std::array<int64_t, 3>, int32_t, HashThree> known;
  for (const auto [i, j] : in_strips(length)) {
    std::array<int64_t, 3> key{kinds[static_cast<size_t>(i)], -1, 0};
    if (i + 1 < j) {
      const SizedBlock& next = in_bytes.blocks[static_cast<size_t>(i) + 1];
      key[1] =
          borders.try_emplace({next.input, next.splittable, next.end_gradient}, borders.size()).first->second;
      key[2] = sharing.problem(i + 1, j);
    } else {
      key[2] = ends.try_emplace(in_bytes.gradient(j), ends.size()).first->second;
    }
    const auto [found, is_new] = known.try_emplace(key, static_cast<int32_t>(sharing.examples.size()));
    if (is_new) sharing.examples.push_back({i, j});
    sharing.problem(i, j) = found->second;
  }
  return sharing;
}

// The recurrence of table.h with the roles of time and memory exchanged: the least memory whatever the time,
// and the memory of the fastest options, which never drop anything.
MemoryBounds memory_bounds(const SizedChain& chain, const Sharing& sharing) {
  const int length = chain.length();
  MemoryBounds bounds{PerInterval<int64_t>(length, 0), PerInterval<int64_t>(length, 0)};
  PerInterval<int64_t> least_by_end(length, 0);  // (j, k): of [k, j), so that the loop over k reads a row
  PerInterval<int64_t> dropping(length, 0);
  std::vector<int64_t> input;
  for (const SizedBlock& block : chain.blocks) input.push_back(block.input);
  for (int i = 0; i < length; ++i) {  // dropping(i, k): the need of a run that drops i ... k - 1
    for (int k = i; k < length; ++k) {
      const SizedBlock& block = chain.blocks[static_cast<size_t>(k)];
      const int64_t need = block.drop_peak + (k > i ? block.input : 0);
      dropping(i, k + 1) = std::max(dropping(i, k), need);
    }
  }
  for (const auto [i, j] : in_strips(length)) {
    const Interval example = sharing.examples[static_cast<size_t>(sharing.problem(i, j))];
    if (example.begin != i || example.end != j) {
      bounds.least(i, j) = least_by_end(j, i) = bounds.least(example.begin, example.end);
      bounds.enough(i, j) = bounds.enough(example.begin, example.end);
      continue;
    }
    const int64_t gradient = chain.gradient(j);
    int64_t least = kNever, enough = kNever;
    for (const SizedOption& option : chain.blocks[static_cast<size_t>(i)].options) {
      const int64_t held = chain.held(i, option, j);
      const int64_t peak = std::max(option.forward_peak + gradient, option.backward_peak);
      least = std::min(least, std::max(peak, held + bounds.least(i + 1, j)));
      if (option.extra_s == 0) enough = std::min(enough, std::max(peak, held + bounds.enough(i + 1, j)));
    }
    const int last = chain.last_middle(i, j);
    const int64_t *drop = dropping.row(i), *front = bounds.least.row(i), *back = least_by_end.row(j);
    for (int k = i + 1; k <= last; ++k) {
      const int64_t need = std::max({drop[k] + gradient, front[k], input[static_cast<size_t>(k)] + back[k]});
      least = std::min(least, need);
    }
    bounds.least(i, j) = least_by_end(j, i) = least;
    bounds.enough(i, j) = enough;
  }
  return bounds;
}

}  // namespace mlsys::activation
