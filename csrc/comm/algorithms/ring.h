// All-reduce among the leaders of all hosts, over TCP.
#pragma once

#include <span>

#include "comm/algorithms/context.h"

namespace mlsys::comm {

// One slice for each host, in partials; null data is allowed for zero elements.
struct Slice {
  std::byte* data = nullptr;
  size_t count = 0;
};

// On return every host's slices hold the combination over all hosts, with the same bits everywhere. Call on
// leaders only, with slices of the same sizes.
void ring_all_reduce(Context& context, const Reducer& reducer, std::span<const Slice> slices);

// blocks[h] holds host h's bytes on host h; on return, on all leaders.
void ring_all_gather(Context& context, std::span<const std::span<std::byte>> blocks);

}  // namespace mlsys::comm
