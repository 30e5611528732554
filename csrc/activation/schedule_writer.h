// Writes out the schedule behind a value of the table, with its true seconds and its true peak.
#pragma once

#include <cstdint>
#include <functional>

#include "activation/chain.h"
#include "activation/intervals.h"
#include "activation/sized_chain.h"
#include "activation/table.h"

namespace mlsys::activation {

// How a part of the chain is begun: by an option of its first block, or by dropping the blocks up to
// `middle`.
struct Choice {
  const SizedOption* option = nullptr;
  int middle = 0;
};

// The choice for the part [i, j) with m units of memory.
using Choose = std::function<Choice(int i, int j, int64_t m)>;

// The choices that give E(m, i, j) of the table.
Choose choose_by_table(const SizedChain& chain, const Table& table);

// Choices that fit into m bytes, exactly, whenever m is at least the part's least. Among those, the one that
// the table, whose units are coarser, finds fastest.
Choose choose_by_bytes(const SizedChain& in_bytes, const MemoryBounds& in_bytes_bounds,
                       const SizedChain& chain, const MemoryBounds& bounds, const Table& table);

// The fastest option of every block. Fits into m bytes whenever m is at least what is enough for the part.
Choose choose_fastest(const SizedChain& in_bytes, const MemoryBounds& in_bytes_bounds);

// The schedule of the whole chain for `memory` units of `sized`, which is what `choose` counts in.
Schedule write_schedule(const Chain& chain, const SizedChain& sized, int64_t memory, const Choose& choose);

}  // namespace mlsys::activation
