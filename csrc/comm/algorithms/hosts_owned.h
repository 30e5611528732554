// Reductions over several hosts in which every slice of the tensor has an owner: each host sends the owner
// what it has of the slice, in a form of its choice, and the owner combines all of it. With shared results
// the owner then sends the result to every host. The volume is that of reduce-scatter + all-gather; what it
// saves beside a ring is the choice of form (an encoding) and of order (a tree), since nothing is combined on
// the way.
#pragma once

#include <span>
#include <vector>

#include "comm/algorithms/context.h"

namespace mlsys::comm {

// A slice of this rank's tensor.
struct OwnedSlice {
  const std::byte* data = nullptr;
  size_t count = 0;
  size_t offset = 0;  // elements before it in the tensor
  int host = 0;       // the owner
  int local = -1;     // the rank of that host that combines it; -1: its ranks share the work
};

// Elements [first, first + count) of a tile of `tile` elements of a slice, and where they lie in the tensor.
struct OwnedPart {
  size_t element = 0;
  size_t first = 0;
  size_t count = 0;
  size_t tile = 0;
};

// What is sent and how it is combined. Called with parts that start at multiples of kGrain elements; each
// part of a message or of a result is written by one rank. `sources` are the part's elements on each rank of
// this host, in rank order.
class OwnerProtocol {
 public:
  static constexpr size_t kGrain = 256;

  virtual ~OwnerProtocol() = default;
  // Bytes that `host` sends an owner about `count` elements, and that an owner sends about their result.
  // Additive over multiples of kGrain.
  virtual size_t message_bytes(int host, size_t count) const = 0;
  virtual size_t result_bytes(size_t count) const = 0;
  // This host's part of its message to another owner.
  virtual void contribute(const OwnedPart& part, std::span<const void* const> sources,
                          std::byte* message) const = 0;
  // messages[h] is what host h sent about the tile, null for this host.
  virtual void combine(const OwnedPart& part, std::span<const void* const> sources,
                       std::span<const std::byte* const> messages, std::byte* result) const = 0;
  // A whole tile's result -> elements.
  virtual void deliver(const std::byte* result, std::byte* elements, size_t count) const = 0;
};

struct OwnedReduction {
  std::vector<OwnedSlice> slices;  // of equal number, sizes and owners on all ranks
  size_t element_bytes = 0;
  size_t num_elements = 0;  // of the whole tensor, whose arena offset is in the descriptor if it has one
  std::byte* output =
      nullptr;  // where results go: the tensor when they are shared, this rank's slice otherwise
  bool shares_results = true;
};

void reduce_by_owners(Context& context, const OwnerProtocol& protocol, const OwnedReduction& reduction);

// One slice for each host, whose ranks share the work: for an all-reduce of `count` elements at `data`.
OwnedReduction owned_by_hosts(const Topology& topology, void* data, size_t count, size_t element_bytes);

}  // namespace mlsys::comm
