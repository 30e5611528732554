// The table of the least extra time of every part of a chain for every size of memory.
//
// E(m, i, j) is the time beyond every block's fastest option that forward and backward of the blocks [i, j)
// need when the input of block i is held and m units are free besides. With a_k the input of block k, g_j the
// gradient that waits at the part's end and e_io the extra time of option o:
//
//   E(m, i, j) = min( min over o of  e_io + E(m - w_io, i + 1, j)
//                         if m >= forward peak of o + g_j and m >= backward peak of o,
//                     min over k of  F(i, k) + E(m - a_k, k, j) + E(m, i, k)
//                         if m >= g_j + input + drop peak of every block that is dropped in [i, k) )
//
// where w_io is what stays of option o, F(i, k) the time of dropping forwards from i to k, and i < k < j up
// to the first border that cannot be crossed. The input of the run's first block is held anyway and not added
// to its peak. Behind such a border, w_io also holds the input that is stored there. E(m, j, j) = 0 for m >=
// 0.
//
// This is the dynamic programme of Herrmann, Beaumont, Eyraud-Dubois, Hermann, Joly & Shilova 2019, "Optimal
// checkpointing for heterogeneous chains", with several options a block as in Zhao, Gusak et al. 2023,
// "Rockmate". It is exact for the schedules that keep what they have stored until its backward and run again
// from the nearest stored input.
//
// What makes it fast, all of it exact: equal parts are one problem; a row holds only the m between the least
// memory at which the part runs and the memory from which E is 0; and most middles k are refused sixteen
// sizes at a time (table_kernel.h). Times are float32 relative to the fastest: what is lost is below
// (2 L + 2) 2^-24 of the extra time.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "activation/intervals.h"
#include "activation/sized_chain.h"
#include "core/cpu.h"

namespace mlsys::activation {

// Sizes are stored in groups of 16, which begin at multiples of 16.
constexpr int64_t kGroup = 16;

// One part's solution for the sizes [16 * begin, 16 * end): below it is infinite, above it is 0.
struct Row {
  int64_t begin = 0, end = 0;  // groups
  int64_t values = 0;          // where group `begin` starts; 16 infinities before, 16 zeros after the row
  int64_t lowest = 0;          // where the groups' last values start, which are their least; a 0 after them
};

class Table {
 public:
  // Fills the table for sizes up to `cap`; larger sizes must not be asked for.
  Table(const SizedChain& chain, const Sharing& sharing, const MemoryBounds& bounds, int64_t cap,
        SimdLevel level);

  // E(m, i, j), the same bits on every instruction set. Infinite when the part does not fit.
  float at(int i, int j, int64_t m) const {
    if (m < 0) return std::numeric_limits<float>::infinity();
    if (i == j) return 0;
    const Row& row = rows_[static_cast<size_t>(sharing_.problem(i, j))];
    if (m < row.begin * kGroup) return std::numeric_limits<float>::infinity();
    if (m >= row.end * kGroup) return 0;
    return values_[static_cast<size_t>(row.values + m - row.begin * kGroup)];
  }

  // Numbers that a table up to `cap` stores.
  static int64_t num_values(const Sharing& sharing, const MemoryBounds& bounds, int64_t cap);

 private:
  void fill(const Interval& part, const MemoryBounds& bounds);
  void relax_options(const Interval& part, const MemoryBounds& bounds, const Row& row);

  const SizedChain& chain_;
  const Sharing& sharing_;
  SimdLevel level_;
  std::vector<Row> rows_;  // by problem
  std::unique_ptr<float[]> values_;
  std::vector<float> lowest_, zeros_, highest_;
};

}  // namespace mlsys::activation
