// Finds, for a chain of blocks and budgets of memory, the schedules that take the least time.
#pragma once

#include <cstdint>
#include <vector>

#include "activation/chain.h"

namespace mlsys::activation {

struct Solution {
  int64_t least_bytes = 0;          // no schedule needs less; exact, whatever the unit
  int64_t enough_bytes = 0;         // from here on every block runs its fastest option
  int64_t unit_bytes = 0;           // of the table; 0 when no budget needed one
  int64_t num_slots = 0;            // from 0 to enough_bytes
  int64_t num_problems = 0;         // different parts of the chain
  std::vector<Schedule> schedules;  // one a budget, in the order given; without steps where none fits
};

// Solves the chain for all budgets (bytes, not negative) with one table of about `num_slots` sizes up to
// enough_bytes; 0 chooses their number by the chain. The unit depends on the chain and num_slots
// alone, and a larger budget never gives a slower schedule. Sizes are rounded up to units; where the greatest
// common divisor of all sizes is large enough to be the unit, nothing is rounded. The chain has at least one
// block, every block an option; sizes and times are finite and not negative.
Solution solve(const Chain& chain, const std::vector<int64_t>& budgets, int64_t num_slots = 0);

}  // namespace mlsys::activation
