#include "comm/algorithms/ring.h"

#include <array>
#include <vector>

namespace mlsys::comm {
namespace {

constexpr size_t kChunkBytes = 512 << 10;
constexpr int kNumTries = 20;

// The order of chunks on both streams: step by step, and within a step chunk by chunk.
struct Position {
  size_t step = 0;
  size_t chunk = 0;
  size_t moved = 0;  // bytes of the current chunk

  size_t index(size_t num_chunks) const { return step * num_chunks + chunk; }
  void next(size_t num_chunks) {
    moved = 0;
    if (++chunk == num_chunks) {
      chunk = 0;
      ++step;
    }
  }
};

class Ring {
 public:
  Ring(Context& context, const Reducer& reducer, std::span<const Slice> slices)
      : mesh_(*context.mesh),
        reducer_(reducer),
        slices_(slices),
        hosts_(slices.size()),
        me_(static_cast<size_t>(context.topology.my_host())),
        next_(context.topology.leader_of(static_cast<int>((me_ + 1) % hosts_))),
        previous_(context.topology.leader_of(static_cast<int>((me_ + hosts_ - 1) % hosts_))),
        chunk_count_(kChunkBytes / reducer.partial_bytes()),
        inbox_(kChunkBytes) {
    size_t largest = 0;
    for (const Slice& slice : slices) largest = std::max(largest, slice.count);
    num_chunks_ = std::max<size_t>(1, (largest + chunk_count_ - 1) / chunk_count_);
  }

  void run() {
    const size_t num_steps = 2 * (hosts_ - 1);
    int tries = 0;
    while (sent_.step < num_steps || received_.step < num_steps) {
      const bool moved = send_some(num_steps) | receive_some(num_steps);
      tries = moved ? 0 : tries + 1;
      if (tries <= kNumTries) continue;
      tries = 0;
      const bool may_send = sent_.step < num_steps && may_send_now();
      const std::array readers{previous_}, writers{next_};
      mesh_.wait(std::span(readers).first(received_.step < num_steps ? 1 : 0),
                 std::span(writers).first(may_send ? 1 : 0));
    }
  }

 private:
  Slice chunk_of(size_t slice, size_t chunk) const {
    const Slice& whole = slices_[slice];
    const size_t first = std::min(whole.count, chunk * chunk_count_);
    return {whole.data + first * reducer_.partial_bytes(), std::min(chunk_count_, whole.count - first)};
  }
  Slice outgoing() const { return chunk_of((me_ + 2 * hosts_ - sent_.step) % hosts_, sent_.chunk); }
  Slice incoming() const {
    return chunk_of((me_ + 2 * hosts_ - received_.step - 1) % hosts_, received_.chunk);
  }

  // What is sent in one step was received in the step before, chunk by chunk.
  bool may_send_now() const {
    return sent_.step == 0 || received_.index(num_chunks_) > sent_.index(num_chunks_) - num_chunks_;
  }

  bool send_some(size_t num_steps) {
    if (sent_.step == num_steps || !may_send_now()) return false;
    const Slice chunk = outgoing();
    const size_t bytes = chunk.count * reducer_.partial_bytes();
    const size_t sent = mesh_.try_send(next_, chunk.data + sent_.moved, bytes - sent_.moved);
    sent_.moved += sent;
    if (sent_.moved < bytes) return sent != 0;
    sent_.next(num_chunks_);
    return true;
  }

  bool receive_some(size_t num_steps) {
    if (received_.step == num_steps) return false;
    const Slice chunk = incoming();
    const size_t bytes = chunk.count * reducer_.partial_bytes();
    const bool reducing = received_.step < hosts_ - 1;
    std::byte* target = reducing ? inbox_.data() : chunk.data;
    const size_t got = mesh_.try_receive(previous_, target + received_.moved, bytes - received_.moved);
    received_.moved += got;
    if (received_.moved < bytes) return got != 0;
    if (reducing) reducer_.merge(inbox_.data(), chunk.data, chunk.data, chunk.count);
    received_.next(num_chunks_);
    return true;
  }

  Mesh& mesh_;
  const Reducer& reducer_;
  std::span<const Slice> slices_;
  size_t hosts_;
  size_t me_;
  int next_;
  int previous_;
  size_t chunk_count_;
  size_t num_chunks_ = 1;
  std::vector<std::byte> inbox_;
  Position sent_;
  Position received_;
};

}  // namespace

// Reduce-scatter, then all-gather, on a ring of hosts. In step s < H - 1, host h sends slice h - s and
// combines what arrives into slice h - s - 1; after H - 1 steps it owns the complete slice h + 1, and H - 1
// more steps of the same movement, without combining, bring every slice to every host. Slices travel in
// chunks, and a chunk is forwarded as soon as it is complete, so steps overlap and the kernel receives the
// next chunk while this one is added. Each host sends 2 (H - 1) / H of the data, which is the least possible.
// Each slice is combined in ring order starting after its index, whatever the chunk size. Patarasuk & Yuan,
// J. Parallel Distrib. Comput. 69 (2009).
void ring_all_reduce(Context& context, const Reducer& reducer, std::span<const Slice> slices) {
  Ring(context, reducer, slices).run();
}

// Step s: send the block that arrived in step s - 1 (at first the own one), receive the one before it.
void ring_all_gather(Context& context, std::span<const std::span<std::byte>> blocks) {
  const size_t hosts = blocks.size();
  const auto me = static_cast<size_t>(context.topology.my_host());
  const int next = context.topology.leader_of(static_cast<int>((me + 1) % hosts));
  const int previous = context.topology.leader_of(static_cast<int>((me + hosts - 1) % hosts));
  for (size_t step = 0; step + 1 < hosts; ++step) {
    const std::span<std::byte> out = blocks[(me + hosts - step) % hosts];
    const std::span<std::byte> in = blocks[(me + hosts - step - 1) % hosts];
    const std::array sends{Outgoing{next, out.data(), out.size()}};
    const std::array receives{Incoming{previous, in.data(), in.size()}};
    context.mesh->transfer(sends, receives);
  }
}

}  // namespace mlsys::comm
