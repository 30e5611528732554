// The passes of a sharded update inside a host, over buffers in the shared arena.
//
// reduce_shard  reads what this rank owns from all ranks and stores the reduction in this rank's own buffer:
//               the norm pass. Nobody else reads or writes those elements of that buffer.
// fused step    for each tile of what this rank owns: the reduction goes into a scratch tile that stays in
//               the cache, the update turns it into new parameters in this rank's buffer, and those are
//               copied, still in the cache, into everybody else's. With one gradient buffer there is nothing
//               left to reduce, and the update reads that buffer.
//
// The arrival says that all gradients are final and all old parameters have been used; the barrier at the end
// that nobody reads this rank's gradients any more and all its parameters are new. Ranks are combined in the
// order of an all-reduce, so both give its bits.
#include <array>
#include <memory>
#include <vector>

#include "comm/algorithms/local.h"
#include "core/streaming.h"

namespace mlsys::comm {
namespace {

constexpr size_t kSweepBytes =
    256 << 10;                           // of a stored reduction: on_tile finds it in the second-level cache
constexpr size_t kTileBytes = 16 << 10;  // of a scratch reduction: half of a first-level cache

// Calls visit(first, count) for the tiles of what this rank owns.
template <class Visit>
void for_each_tile(const Context& context, Communicator::Partition partition, size_t tile, Visit visit) {
  const auto rank = static_cast<size_t>(context.topology.rank);
  const auto stride = static_cast<size_t>(context.topology.size) + 1;
  for (size_t row = 0; row < partition.size(); row += stride) {
    const size_t end = partition[row + rank + 1];
    for (size_t first = partition[row + rank]; first < end; first += tile) {
      visit(first, std::min(tile, end - first));
    }
  }
}

void point_at(std::vector<const void*>& sources, LocalBuffers buffers, size_t offset_bytes) {
  for (size_t i = 0; i < buffers.size(); ++i) sources[i] = buffers[i] + offset_bytes;
}

}  // namespace

void local_reduce_shard(Context& context, const Reducer& reducer, LocalBuffers buffers,
                        Communicator::Partition partition, const Communicator::OnTile& on_tile) {
  const size_t element = reducer.element_bytes();
  std::byte* mine = buffers[static_cast<size_t>(context.team.index())];
  std::vector<const void*> sources(buffers.size());
  size_t num_bytes = 0;
  for_each_tile(context, partition, kSweepBytes / element, [&](size_t first, size_t count) {
    point_at(sources, buffers, first * element);
    void* target = mine + first * element;
    reducer.reduce(sources, std::array{target}, count);
    on_tile(target, first, count);
    num_bytes += count * element;
  });
  context.team.barrier();
  context.counters.add_shm(num_bytes * (buffers.size() - 1));
  context.counters.add_zero_copy();
}

void local_fused_step(Context& context, const Reducer& reducer, LocalBuffers gradients,
                      LocalBuffers parameters, Communicator::Partition partition,
                      const Communicator::OnTile& update) {
  const size_t element = reducer.element_bytes();
  const auto me = static_cast<size_t>(context.team.index());
  const std::unique_ptr<std::byte[]> memory(new std::byte[kTileBytes + 64]);
  std::byte* scratch = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64;
  std::vector<const void*> sources(gradients.size());
  size_t num_bytes = 0;
  for_each_tile(context, partition, kTileBytes / element, [&](size_t first, size_t count) {
    const size_t offset = first * element;
    const void* reduced = gradients[0] + offset;
    if (gradients.size() > 1) {
      point_at(sources, gradients, offset);
      reducer.reduce(sources, std::array<void*, 1>{scratch}, count);
      reduced = scratch;
    }
    update(reduced, first, count);
    for (size_t other = 0; other < parameters.size(); ++other) {
      if (other != me) copy_streaming(parameters[other] + offset, parameters[me] + offset, count * element);
    }
    num_bytes += count * element;
  });
  context.team.barrier();
  context.counters.add_shm(num_bytes * (gradients.size() - 1 + parameters.size() - 1));
  context.counters.add_zero_copy();
}

}  // namespace mlsys::comm
