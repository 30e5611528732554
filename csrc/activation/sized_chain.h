// The chain as the recurrence needs it: sizes in units, useless options gone, times relative to the fastest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "activation/chain.h"

namespace mlsys::activation {

struct SizedOption {
  int64_t saved, forward_peak, backward_peak;
  double extra_s;  // forward and backward, beyond the block's fastest option
  int32_t index;   // in BlockCosts::options
};

struct SizedBlock {
  int64_t input;         // 0 for the first block
  int64_t end_gradient;  // gradient of this block's input, waiting while a segment that ends here runs
  int64_t drop_peak;
  double drop_s;
  bool splittable;
  int next_border;  // the first block behind this one that is not splittable; the chain's length if none
  std::vector<SizedOption> options;  // by saved bytes; none is at least as bad in everything as another
};

struct SizedChain {
  int64_t unit;  // bytes; every size is rounded up to units
  std::vector<SizedBlock> blocks;

  int length() const { return static_cast<int>(blocks.size()); }
  // What waits for the backward of block `end - 1` while the segment in front of `end` is worked on.
  int64_t gradient(int end) const {
    return end < length() ? blocks[static_cast<size_t>(end)].end_gradient : 0;
  }
  // What stays besides the segment's input once block i has run under the option, in a segment up to `end`.
  int64_t held(int i, const SizedOption& option, int end) const {
    const bool stored_apart = i + 1 < end && !blocks[static_cast<size_t>(i) + 1].splittable;
    return option.saved + (stored_apart ? blocks[static_cast<size_t>(i) + 1].input : 0);
  }
  // The last place where a dropped run that begins with block i may end: a border that cannot be crossed.
  int last_middle(int i, int end) const {
    return std::min(end - 1, blocks[static_cast<size_t>(i)].next_border);
  }
};

SizedChain in_units(const Chain& chain, int64_t unit);

// The greatest number of bytes that divides every size of the chain that matters; 0 when all are 0.
int64_t common_unit(const SizedChain& in_bytes);

}  // namespace mlsys::activation
