// The sharded updates of the Communicator: in one pass where the ranks share memory, else composed.
//
// Composed, they are one reduce_scatter and one all_gather a row. Parts of a row may differ in size, and
// those operations have equal ones, so every part is taken as long as the longest: a contribution that starts
// at the owner's part and runs on into its neighbour's, of which the owner drops what is not its own.
#include <algorithm>
#include <memory>
#include <stdexcept>

#include "comm/algorithms/local.h"
#include "comm/engine.h"

namespace mlsys::comm {
namespace {

void check_partition(Communicator::Partition partition, size_t size, size_t count) {
  const size_t stride = size + 1;
  bool ok = partition.size() % stride == 0;
  for (size_t i = 0; ok && i < partition.size(); ++i)
    ok = partition[i] <= count && (i == 0 || partition[i] >= partition[i - 1]);
  if (ok) return;
  throw std::invalid_argument("a partition of " + std::to_string(partition.size()) +
                              " offsets was given for " + std::to_string(count) + " elements and " +
                              std::to_string(size) + " ranks. Rows of " + std::to_string(stride) +
                              " ascending offsets that do not exceed the number of elements are expected.");
}

// One row of a partition, as the composed way sees it.
class Row {
 public:
  Row(Communicator::Partition partition, size_t index, size_t size)
      : bounds_(partition.subspan(index * (size + 1), size + 1)) {
    for (size_t rank = 0; rank < size; ++rank) longest_ = std::max(longest_, count(rank));
  }
  size_t first(size_t rank) const { return bounds_[rank]; }
  size_t count(size_t rank) const { return bounds_[rank + 1] - bounds_[rank]; }
  size_t longest() const { return longest_; }
  // Where `longest` elements begin that contain the rank's part and do not leave the row.
  size_t window(size_t rank) const { return std::min(bounds_[rank], bounds_.back() - longest_); }

 private:
  Communicator::Partition bounds_;
  size_t longest_ = 0;
};

using Scratch = std::unique_ptr<std::byte[]>;

// The reduction of what rank `me` owns of a row: at the returned offset (bytes) of `scratch`, which is made.
size_t reduce_row(Communicator& group, const void* data, const Row& row, const Reduction& reduction,
                  size_t element, Scratch& scratch, std::chrono::milliseconds timeout) {
  std::vector<const void*> inputs;
  for (size_t rank = 0; rank < static_cast<size_t>(group.size()); ++rank) {
    inputs.push_back(at(data, row.window(rank) * element));
  }
  scratch.reset(new std::byte[row.longest() * element]);
  group.reduce_scatter(inputs, scratch.get(), row.longest(), reduction, timeout);
  const auto me = static_cast<size_t>(group.rank());
  return (row.first(me) - row.window(me)) * element;
}

// Gives every rank what the others own of a row of `data`.
void gather_row(Communicator& group, void* data, const Row& row, size_t element,
                std::chrono::milliseconds timeout) {
  const auto size = static_cast<size_t>(group.size());
  const auto me = static_cast<size_t>(group.rank());
  const size_t bytes = row.longest() * element;
  const Scratch boxes(new std::byte[bytes * size]);
  std::vector<void*> outputs;
  for (size_t rank = 0; rank < size; ++rank) outputs.push_back(boxes.get() + rank * bytes);
  copy_bytes(outputs[me], at(data, row.first(me) * element), row.count(me) * element);
  group.all_gather(outputs[me], outputs, bytes, timeout);
  for (size_t rank = 0; rank < size; ++rank) {
    if (rank != me) copy_bytes(at(data, row.first(rank) * element), outputs[rank], row.count(rank) * element);
  }
}

template <class Visit>
void for_each_row(Communicator::Partition partition, size_t size, Visit visit) {
  for (size_t index = 0; index < partition.size() / (size + 1); ++index) {
    const Row row(partition, index, size);
    if (row.longest() != 0) visit(row);
  }
}

}  // namespace

void Engine::reduce_shard(void* data, size_t count, Reduction reduction, Partition partition,
                          const OnTile& on_tile, Timeout timeout) {
  const auto size = static_cast<size_t>(options_.size);
  const auto me = static_cast<size_t>(options_.rank);
  check_partition(partition, size, count);
  if (reduce_shard_directly(data, count, reduction, partition, on_tile, timeout)) return;
  const size_t element = Reducer(reduction, options_.size).element_bytes();
  for_each_row(partition, size, [&](const Row& row) {
    Scratch scratch;
    const size_t skip = reduce_row(*this, data, row, reduction, element, scratch, timeout);
    void* target = at(data, row.first(me) * element);
    copy_bytes(target, scratch.get() + skip, row.count(me) * element);
    if (row.count(me) != 0) on_tile(target, row.first(me), row.count(me));
  });
}

void Engine::reduce_scatter_optimize_all_gather(const void* gradients, void* parameters, size_t count,
                                                Reduction reduction, Partition partition, bool is_reduced,
                                                const OnTile& update, Timeout timeout) {
  const auto size = static_cast<size_t>(options_.size);
  const auto me = static_cast<size_t>(options_.rank);
  check_partition(partition, size, count);
  if (optimize_directly(gradients, parameters, count, reduction, partition, is_reduced, update, timeout))
    return;
  const size_t element = Reducer(reduction, options_.size).element_bytes();
  for_each_row(partition, size, [&](const Row& row) {
    Scratch scratch;
    const void* reduced = at(gradients, row.first(me) * element);
    if (!is_reduced) {
      const size_t skip = reduce_row(*this, gradients, row, reduction, element, scratch, timeout);
      reduced = scratch.get() + skip;
    }
    if (row.count(me) != 0) update(reduced, row.first(me), row.count(me));
    gather_row(*this, parameters, row, element, timeout);
  });
}

bool Engine::reduce_shard_directly(void* data, size_t count, const Reduction& reduction, Partition partition,
                                   const OnTile& on_tile, Timeout timeout) {
  const std::lock_guard lock(running_);
  expect_open();
  if (options_.size > 1 && links().topology.num_hosts() > 1) return false;
  const Reducer reducer(reduction, options_.size);
  std::vector<std::byte*> buffers{static_cast<std::byte*>(data)};
  if (options_.size == 1) {
    begin_alone();
    for (size_t row = 0; row < partition.size(); row += 2) {
      void* part = at(data, partition[row] * reducer.element_bytes());
      const size_t n = partition[row + 1] - partition[row];
      reducer.reduce(std::array<const void*, 1>{part}, std::array{part}, n);
      if (n != 0) on_tile(part, partition[row], n);
    }
    return true;
  }
  const size_t bytes = count * reducer.element_bytes();
  Descriptor call = new_reduction(OpKind::kReduceShard, count, -1, reduction);
  call.arena_offset = offset_of(data, bytes);
  Context context = begin(call, timeout, {});
  buffers.clear();
  for (int local = 0; local < context.team.size(); ++local) {
    buffers.push_back(context.team.published(local, context.team.descriptor(local).arena_offset, bytes));
    if (buffers.back() == nullptr) return false;
  }
  local_reduce_shard(context, reducer, buffers, partition, on_tile);
  return true;
}

bool Engine::optimize_directly(const void* gradients, void* parameters, size_t count,
                               const Reduction& reduction, Partition partition, bool is_reduced,
                               const OnTile& update, Timeout timeout) {
  const std::lock_guard lock(running_);
  expect_open();
  if (options_.size > 1 && links().topology.num_hosts() > 1) return false;
  const Reducer reducer(reduction, options_.size);
  const size_t bytes = count * reducer.element_bytes();
  if (options_.size == 1) {
    begin_alone();
    for (size_t row = 0; row < partition.size(); row += 2) {
      const size_t n = partition[row + 1] - partition[row];
      const std::byte* part = at(gradients, partition[row] * reducer.element_bytes());
      const Scratch scratch(new std::byte[n * reducer.element_bytes()]);
      if (!is_reduced)
        reducer.reduce(std::array<const void*, 1>{part}, std::array<void*, 1>{scratch.get()}, n);
      if (n != 0) update(is_reduced ? part : scratch.get(), partition[row], n);
    }
    return true;
  }
  Descriptor call = new_reduction(OpKind::kFusedStep, count, -1, reduction);
  call.arena_offset = offset_of(gradients, bytes);
  // Where the parameters lie travels beside the descriptor, which has room for one buffer.
  const uint64_t offset = offset_of(parameters, bytes);
  Context context = begin(call, timeout, std::as_bytes(std::span(&offset, 1)));
  std::vector<std::byte*> from, to;
  for (int local = 0; local < context.team.size(); ++local) {
    uint64_t published = 0;
    std::memcpy(&published, context.team.inline_payload(local), sizeof(published));
    from.push_back(context.team.published(local, context.team.descriptor(local).arena_offset, bytes));
    to.push_back(context.team.published(local, published, bytes));
    if (from.back() == nullptr || to.back() == nullptr) return false;
  }
  const auto own = LocalBuffers(from).subspan(static_cast<size_t>(context.team.index()), 1);
  local_fused_step(context, reducer, is_reduced ? own : LocalBuffers(from), to, partition, update);
  return true;
}

}  // namespace mlsys::comm
