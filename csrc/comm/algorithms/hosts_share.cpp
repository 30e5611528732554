// All-gather, broadcast and barrier over several hosts.
#include "comm/algorithms/hosts.h"
#include "comm/algorithms/hosts_pipeline.h"

namespace mlsys::comm {
namespace {

// Every rank sends its own block to one rank of each other host, in one hop. Ring j carries the blocks of the
// j-th ranks of all hosts; slice h of ring j is the block of host h's j-th rank, nothing where it has none.
class Gather final : public TileStages {
 public:
  Gather(Context& context, const HostPlan& plan, const void* input, std::span<void* const> outputs,
         size_t bytes)
      : context_(context),
        team_(context.team),
        topology_(context.topology),
        plan_(plan),
        input_(input),
        outputs_(outputs),
        bytes_(bytes),
        alone_(team_.size() == 1),
        portion_(std::min(kChunkBytes, ControlBlock::kScratchBytes /
                                           (kTileSlots * plan.rings.size() * topology_.hosts.size()))) {}

  size_t num_tiles() const { return (bytes_ + portion_.count - 1) / portion_.count; }

  Wire::Chunk chunk_at(size_t ring, size_t tile, size_t host) const {
    const std::vector<int>& ranks = topology_.hosts[host];
    if (ring >= ranks.size()) return {};
    const size_t first = tile * portion_.count;
    const size_t bytes = std::min(portion_.count, bytes_ - first);
    const int rank = ranks[ring];
    if (rank == topology_.rank) return {const_cast<std::byte*>(at(input_, first)), bytes};
    if (alone_) return {at(outputs_[static_cast<size_t>(rank)], first), bytes};
    return {box(ring, tile, host), bytes};
  }

  void publish(size_t) override {}

  void load(size_t tile) override {
    const auto host = static_cast<size_t>(topology_.my_host());
    const auto ring = static_cast<size_t>(team_.index());
    const Wire::Chunk mine = chunk_at(ring, tile, host);
    copy_bytes(at(outputs_[static_cast<size_t>(topology_.rank)], tile * portion_.count), mine.data,
               mine.bytes);
    if (!alone_) copy_bytes(box(ring, tile, host), mine.data, mine.bytes);
  }

  void finish(size_t) override {}

  void collect(size_t tile) override {
    if (alone_) return;
    for (size_t ring = 0; ring < plan_.rings.size(); ++ring) {
      const auto member = plan_.rings.members[ring][static_cast<size_t>(topology_.my_host())];
      for (size_t host = 0; host < topology_.hosts.size(); ++host) {
        const Wire::Chunk chunk = chunk_at(ring, tile, host);
        if (chunk.bytes == 0 || topology_.hosts[host][ring] == topology_.rank) continue;
        copy_bytes(at(outputs_[static_cast<size_t>(topology_.hosts[host][ring])], tile * portion_.count),
                   chunk.data, chunk.bytes);
        if (member != topology_.rank) context_.counters.add_shm(chunk.bytes);
      }
    }
  }

 private:
  std::byte* box(size_t ring, size_t tile, size_t host) const {
    const size_t index = (tile % kTileSlots * plan_.rings.size() + ring) * topology_.hosts.size() + host;
    return team_.scratch() + index * portion_.count;
  }

  Context& context_;
  LocalTeam& team_;
  const Topology& topology_;
  const HostPlan& plan_;
  const void* input_;
  std::span<void* const> outputs_;
  size_t bytes_;
  bool alone_;  // on this host: what arrives goes straight to its place
  Portion portion_;
};

// The root's host publishes a tile in the slot itself, for its own ranks as for the wire.
class Spread final : public TileStages {
 public:
  Spread(Context& context, const HostPlan& plan, void* data, size_t bytes, int root)
      : context_(context),
        team_(context.team),
        plan_(plan),
        data_(data),
        bytes_(bytes),
        is_root_(context.topology.rank == root),
        alone_(team_.size() == 1),
        portion_(std::min(kChunkBytes, ControlBlock::kScratchBytes / (kTileSlots * plan.rings.size()))) {}

  size_t num_tiles() const {
    const size_t tile = plan_.rings.size() * portion_.count;
    return (bytes_ + tile - 1) / tile;
  }

  Wire::Chunk chunk_at(size_t ring, size_t tile) const {
    const Range range = range_of(ring, tile);
    return {alone_ || is_root_ ? at(data_, range.first) : box(ring, tile), range.count};
  }

  void publish(size_t tile) override {
    if (!is_root_ || alone_) return;
    for (size_t ring = 0; ring < plan_.rings.size(); ++ring) {
      const Range range = range_of(ring, tile);
      copy_bytes(box(ring, tile), at(data_, range.first), range.count);
    }
  }

  void load(size_t) override {}
  void finish(size_t) override {}

  void collect(size_t tile) override {
    if (is_root_ || alone_) return;
    for (size_t ring = 0; ring < plan_.rings.size(); ++ring) {
      const Range range = range_of(ring, tile);
      copy_bytes(at(data_, range.first), box(ring, tile), range.count);
      const auto host = static_cast<size_t>(context_.topology.my_host());
      if (plan_.rings.members[ring][host] != context_.topology.rank) context_.counters.add_shm(range.count);
    }
  }

 private:
  Range range_of(size_t ring, size_t tile) const {
    const size_t length = plan_.rings.size() * portion_.count;
    const Range part =
        part_of(std::min(length, bytes_ - tile * length), ring, plan_.rings.size(), portion_.grain);
    return {tile * length + part.first, part.count};
  }
  std::byte* box(size_t ring, size_t tile) const {
    return team_.scratch() + (tile % kTileSlots * plan_.rings.size() + ring) * portion_.count;
  }

  Context& context_;
  LocalTeam& team_;
  const HostPlan& plan_;
  void* data_;
  size_t bytes_;
  bool is_root_;
  bool alone_;
  Portion portion_;
};

}  // namespace

void hosts_all_gather(Context& context, const void* input, std::span<void* const> outputs, size_t bytes) {
  const HostPlan plan = plan_of(context.topology, context.team.mine());
  Gather gather(context, plan, input, outputs, bytes);
  Wire wire(
      context, plan, gather.num_tiles(),
      [&](size_t ring, size_t tile, size_t host) { return gather.chunk_at(ring, tile, host); }, nullptr);
  run_pipeline(context, gather, wire, gather.num_tiles());
}

void hosts_broadcast(Context& context, void* data, size_t bytes, int root) {
  const HostPlan plan = plan_of(context.topology, context.team.mine());
  Spread spread(context, plan, data, bytes, root);
  Wire wire(
      context, plan, spread.num_tiles(),
      [&](size_t ring, size_t tile, size_t) { return spread.chunk_at(ring, tile); }, nullptr);
  run_pipeline(context, spread, wire, spread.num_tiles());
}

// Dissemination among the leaders: in step s, tell the host 2^s further on and hear from the one 2^s before.
// After ceil(log2 H) steps everyone has heard, directly or not, from everyone. Hensgen, Finkel & Manber 1988.
void hosts_barrier(Context& context) {
  const Topology& topology = context.topology;
  const int hosts = topology.num_hosts();
  for (int distance = 1; topology.is_leader() && distance < hosts; distance *= 2) {
    const std::byte token{1};
    std::byte heard{0};
    const std::array sends{Outgoing{topology.leader_of((topology.my_host() + distance) % hosts), &token, 1}};
    const std::array receives{
        Incoming{topology.leader_of((topology.my_host() + hosts - distance) % hosts), &heard, 1}};
    context.mesh->transfer(sends, receives);
  }
  context.team.barrier();
}

}  // namespace mlsys::comm
