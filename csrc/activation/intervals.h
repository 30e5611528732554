// What can be said of every part [i, j) of the chain before the table is filled: which parts are the same
// problem, and between which sizes of memory its solution changes.
#pragma once

#include <cstdint>
#include <vector>

#include "activation/sized_chain.h"

namespace mlsys::activation {

// A square of values for the parts [i, j), 0 <= i <= j <= length.
template <class T>
class PerInterval {
 public:
  PerInterval(int length, T initial)
      : side_(static_cast<size_t>(length) + 1), values_(side_ * side_, initial) {}
  T& operator()(int i, int j) { return values_[static_cast<size_t>(i) * side_ + static_cast<size_t>(j)]; }
  const T& operator()(int i, int j) const {
    return values_[static_cast<size_t>(i) * side_ + static_cast<size_t>(j)];
  }
  // The values of [i, 0), [i, 1), ... one after the other.
  const T* row(int i) const { return values_.data() + static_cast<size_t>(i) * side_; }

 private:
  size_t side_;
  std::vector<T> values_;
};

struct Interval {
  int begin, end;
};

// Parts with the same blocks and the same borders inside have the same solution, so it is computed once.
struct Sharing {
  PerInterval<int32_t> problem;    // of [i, j), i < j; -1 where j <= i
  std::vector<Interval> examples;  // one part of each problem, ordered so that its own parts come first
};
Sharing find_equal_intervals(const SizedChain& in_bytes);

struct MemoryBounds {
  PerInterval<int64_t> least;   // below it no schedule of the part runs
  PerInterval<int64_t> enough;  // from it on the fastest option of every block fits
};
// O(L^3 / 6) in the number of blocks, less where parts are equal.
MemoryBounds memory_bounds(const SizedChain& chain, const Sharing& sharing);

}  // namespace mlsys::activation
