// The inner loops of the table: one part [i, j) takes the minimum over its middles k.
//
// Contract: float32, no nan; infinity means that a part does not fit. Every row falls with the size of
// memory. Hence a group of 16 sizes can be refused by two numbers: with `highest` the first value of the
// group so far, and `lowest` the last values of the groups of both parts that are combined, nothing in the
// group improves when F + lowest + lowest >= highest (rounding is monotone, so this holds for the rounded
// sums as well). Sixteen groups are tested at once; only the others are computed. And as F grows with k,
// groups whose highest value is at most F are out for all further k. Compiled for every instruction set by
// run_simd. Reference and test: tests/native/test_chain_solver.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/cpu.h"

namespace mlsys::activation {

// A middle k: the part in front is read at m, the one behind it at m - shift. Group numbers are absolute.
struct Middle {
  int64_t front_begin, front_end, front_values, front_lowest;
  int64_t back_begin, back_end, back_values, back_lowest;
  int64_t shift;  // input of block k
  int64_t least;  // the dropped run's own need
  float drop_s;   // F(i, k)
};

struct RelaxMiddles {
  const float* values;  // all rows
  const float* lowest;
  const float* zeros;  // as long as a row can be
  float* best;         // of the part, from group `begin` on
  float* highest;      // the first value of each group; 16 more can be read
  int64_t begin;

  // Groups [from, to) of the part, with the other two parts' values and lowest at group `from`.
  MLSYS_INLINE void groups(int64_t from, int64_t to, const float* front, const float* back,
                           const float* front_lowest, const float* back_lowest, float drop_s) const {
    for (int64_t group = from; group < to; group += 16) {
      const int64_t offset = group - from;
      const float* high = highest + (group - begin);
      uint8_t improves[16];
      for (int64_t t = 0; t < 16; ++t) {
        improves[t] = (front_lowest[offset + t] + back_lowest[offset + t]) + drop_s < high[t];
      }
      uint64_t any[2];
      std::memcpy(any, improves, 16);
      if ((any[0] | any[1]) == 0) continue;
      const int64_t count = std::min<int64_t>(16, to - group);
      for (int64_t t = 0; t < count; ++t) {
        if (!improves[t]) continue;
        float* target = best + (group + t - begin) * 16;
        const float *x = front + (offset + t) * 16, *y = back + (offset + t) * 16;
        // Apart from the rows, which the compiler takes to overlap; and GCC vectorises loops, not what it has
        // unrolled before.
        float value[16];
#pragma GCC unroll 1
        for (int64_t s = 0; s < 16; ++s) value[s] = (x[s] + y[s]) + drop_s;
#pragma GCC unroll 1
        for (int64_t s = 0; s < 16; ++s) target[s] = value[s] < target[s] ? value[s] : target[s];
        highest[group + t - begin] = target[0];
      }
    }
  }

  // The group in which the dropped run begins to fit, from that size on.
  MLSYS_INLINE void part_of_group(int64_t size, const float* front, const float* back, float least,
                                  float drop_s) const {
    const int64_t group = size / 16;
    if (least >= highest[group - begin]) return;
    float* target = best + (group - begin) * 16;
    for (int64_t s = size % 16; s < 16; ++s) {
      const float value = (front[s] + back[s]) + drop_s;
      target[s] = value < target[s] ? value : target[s];
    }
    highest[group - begin] = target[0];
  }

  MLSYS_INLINE void operator()(const Middle* middles, int64_t num_middles, int64_t top) const {
    for (int64_t n = 0; n < num_middles; ++n) {
      const Middle& k = middles[n];
      while (top >= begin && highest[top - begin] <= k.drop_s) --top;
      if (top < begin) return;
      // A group of this part covers two groups of the part behind k unless the shift is a multiple of 16: its
      // own and, for the sizes before that, the previous one. `lowest` of the own group bounds both.
      const int64_t group_shift = k.shift / 16;
      const int64_t back_end = k.back_end + (k.shift + 15) / 16;
      int64_t from = std::max({begin, k.front_begin, k.back_begin + group_shift, k.least / 16});
      if (from > top) continue;
      const auto front_at = [&](int64_t group) {
        return group < k.front_end ? values + k.front_values + (group - k.front_begin) * 16 : zeros;
      };
      const auto back_at = [&](int64_t group) {
        return group < back_end ? values + k.back_values + (group - k.back_begin) * 16 - k.shift : zeros;
      };
      const auto front_lowest_at = [&](int64_t group) {
        return group < k.front_end ? lowest + k.front_lowest + (group - k.front_begin) : zeros;
      };
      const auto back_lowest_at = [&](int64_t group) {
        return group < back_end ? lowest + k.back_lowest + (group - group_shift - k.back_begin) : zeros;
      };
      if (from == k.least / 16 && k.least % 16 != 0) {
        const float least = (*front_lowest_at(from) + *back_lowest_at(from)) + k.drop_s;
        part_of_group(k.least, front_at(from), back_at(from), least, k.drop_s);
        ++from;
      }
      // First where both parts need memory, then where one does, then where none does.
      const int64_t edges[2] = {std::min(k.front_end, back_end), std::max(k.front_end, back_end)};
      for (int64_t edge : edges) {
        const int64_t to = std::min(edge, top + 1);
        if (from >= to) continue;
        groups(from, to, front_at(from), back_at(from), front_lowest_at(from), back_lowest_at(from),
               k.drop_s);
        from = to;
      }
      for (; from <= top; ++from) {
        float* target = best + (from - begin) * 16;
        for (int64_t s = 0; s < 16; ++s) target[s] = k.drop_s < target[s] ? k.drop_s : target[s];
        highest[from - begin] = target[0];
      }
    }
  }
};

}  // namespace mlsys::activation
