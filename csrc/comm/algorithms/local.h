// Collectives among the ranks of one host, through shared memory. All are called after await_arrival().
#pragma once

#include <span>

#include "comm/algorithms/context.h"

namespace mlsys::comm {

// Reduction of `count` elements into every local rank's `data`, or into that of local rank `root` alone when
// it is not -1. The data must have been offered to LocalTeam::publish_payload() before arrive().
void local_reduce(Context& context, const Reducer& reducer, void* data, size_t count, int root);
// The same for private memory of any size, without that offer.
void local_reduce_staged(Context& context, const Reducer& reducer, void* data, size_t count, int root);

// inputs[local] are reduced into local rank `local`'s output. `contiguous` says that inputs lie one after
// another from inputs[0], whose arena offset is then in the descriptor.
void local_reduce_scatter(Context& context, const Reducer& reducer, std::span<const void* const> inputs,
                          void* output, size_t count);

// Each source's `bytes` go to every local rank that has an output for it. root >= 0: that local rank is the
// only source; -1: all are. outputs[local] is null where nothing is wanted. The input of a
// source must have been offered as for local_reduce.
void local_share(Context& context, const void* input, std::span<void* const> outputs, size_t bytes, int root);

// Pieces that differ by destination: from inputs[local] to outputs[local] of the others, sizes in bytes.
// Every local rank must have published an ExchangeEntry for each local rank as its payload.
struct ExchangeEntry {
  uint64_t bytes = 0;
  uint64_t arena_offset = Descriptor::kNoOffset;  // of the piece, where it lies in the sender's arena
};
void local_exchange(Context& context, std::span<const void* const> inputs, std::span<const size_t> send_bytes,
                    std::span<void* const> outputs, std::span<const size_t> receive_bytes);

}  // namespace mlsys::comm
