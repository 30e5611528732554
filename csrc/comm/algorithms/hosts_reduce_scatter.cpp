// Reduce-scatter over several hosts. Slice h is what the ranks of host h get. Tile t of every rank's part is
// cut into a piece for each ring; a ring's rank combines its host's contributions to that piece of all parts
// and sends each host what its ranks get, once. So every byte crosses the network once, in one hop.
#include "comm/algorithms/hosts.h"
#include "comm/algorithms/hosts_pipeline.h"

namespace mlsys::comm {
namespace {

class ScatterReduce final : public TileStages {
 public:
  ScatterReduce(Context& context, const HostPlan& plan, const Reducer& reducer,
                std::span<const void* const> inputs, void* output, size_t count)
      : context_(context),
        team_(context.team),
        topology_(context.topology),
        plan_(plan),
        reducer_(reducer),
        inputs_(inputs),
        output_(output),
        count_(count),
        most_local_(plan.rings.size()),
        piece_(room(topology_, plan, reducer)) {
    const size_t whole = count * inputs.size() * reducer.element_bytes();
    for (int local = 0; local < team_.size(); ++local) {
      buffers_.push_back(team_.published(local, team_.descriptor(local).arena_offset, whole));
      direct_ &= buffers_.back() != nullptr || team_.size() == 1;
    }
  }

  // Elements of each rank's part in a chunk; the same on all hosts, wherever their tensors lie.
  static size_t room(const Topology& topology, const HostPlan& plan, const Reducer& reducer) {
    const size_t rings = plan.rings.size(), ranks = static_cast<size_t>(topology.size);
    const size_t chunks = kTileSlots * rings * topology.hosts.size();
    const size_t on_the_wire = std::min(kChunkBytes, ControlBlock::kScratchBytes / chunks);
    return std::min(on_the_wire / rings / reducer.partial_bytes(),
                    ControlBlock::kWireStageBytes / (kTileSlots * rings * ranks) / reducer.element_bytes());
  }

  size_t num_tiles() const {
    const size_t tile = plan_.rings.size() * piece_.count;
    return (count_ + tile - 1) / tile;
  }

  // The pieces of a host's ranks lie one after another.
  Wire::Chunk chunk_at(size_t ring, size_t tile, size_t host) const {
    const size_t bytes = range_of(ring, tile).count * topology_.hosts[host].size() * reducer_.partial_bytes();
    return {partial(ring, tile, host, 0), bytes};
  }

  void publish(size_t tile) override {
    if (direct_) return;
    for (size_t ring = 0; ring < plan_.rings.size(); ++ring) {
      if (plan_.rings.members[ring][my_host()] == topology_.rank) continue;
      const Range range = range_of(ring, tile);
      for (size_t rank = 0; rank < inputs_.size(); ++rank) {
        copy_bytes(staged(team_.index(), ring, tile, rank), at(inputs_[rank], bytes(range.first)),
                   bytes(range.count));
      }
    }
  }

  void load(size_t tile) override {
    std::vector<const void*> sources(static_cast<size_t>(team_.size()));
    for (const size_t ring : plan_.rings.mine) {
      const Range range = range_of(ring, tile);
      for (size_t rank = 0; rank < inputs_.size(); ++rank) {
        for (int local = 0; local < team_.size(); ++local) {
          sources[static_cast<size_t>(local)] = source(local, ring, tile, rank, range);
        }
        const auto host = static_cast<size_t>(topology_.host_of[rank]);
        const auto place = static_cast<size_t>(topology_.local_of[rank]);
        reducer_.reduce_to_partial(sources, partial(ring, tile, host, place * range.count), range.count);
      }
      context_.counters.add_shm(bytes(range.count) * inputs_.size() * (sources.size() - 1));
    }
  }

  void finish(size_t) override {}

  void collect(size_t tile) override {
    for (size_t ring = 0; ring < plan_.rings.size(); ++ring) {
      const Range range = range_of(ring, tile);
      const std::byte* mine =
          partial(ring, tile, my_host(), static_cast<size_t>(team_.index()) * range.count);
      reducer_.finish(mine, at(output_, bytes(range.first)), range.count);
      const bool own = plan_.rings.members[ring][my_host()] == topology_.rank;
      if (!own) context_.counters.add_shm(range.count * reducer_.partial_bytes());
    }
  }

  bool zero_copy() const { return direct_ && team_.size() > 1; }

 private:
  size_t bytes(size_t count) const { return count * reducer_.element_bytes(); }
  size_t my_host() const { return static_cast<size_t>(topology_.my_host()); }
  // In elements of every rank's part.
  Range range_of(size_t ring, size_t tile) const {
    const size_t length = plan_.rings.size() * piece_.count;
    const Range part =
        part_of(std::min(length, count_ - tile * length), ring, plan_.rings.size(), piece_.grain);
    return {tile * length + part.first, part.count};
  }
  const std::byte* source(int local, size_t ring, size_t tile, size_t rank, Range range) const {
    if (local == team_.index()) return at(inputs_[rank], bytes(range.first));
    if (direct_) return buffers_[static_cast<size_t>(local)] + bytes(rank * count_ + range.first);
    return staged(local, ring, tile, rank);
  }
  std::byte* staged(int local, size_t ring, size_t tile, size_t rank) const {
    const size_t box = (tile % kTileSlots * plan_.rings.size() + ring) * inputs_.size() + rank;
    return team_.wire_stage(local) + bytes(box * piece_.count);
  }
  std::byte* partial(size_t ring, size_t tile, size_t host, size_t index) const {
    const size_t hosts = topology_.hosts.size();
    const size_t box = (tile % kTileSlots * plan_.rings.size() + ring) * hosts + host;
    return team_.scratch() + (box * most_local_ * piece_.count + index) * reducer_.partial_bytes();
  }

  Context& context_;
  LocalTeam& team_;
  const Topology& topology_;
  const HostPlan& plan_;
  const Reducer& reducer_;
  std::span<const void* const> inputs_;
  void* output_;
  size_t count_;
  size_t most_local_;  // there are as many rings as the largest host has ranks
  Portion piece_;      // of each rank's part
  bool direct_ = true;
  std::vector<const std::byte*> buffers_;  // by local rank, when direct_
};

}  // namespace

void hosts_reduce_scatter(Context& context, const Reducer& reducer, std::span<const void* const> inputs,
                          void* output, size_t count) {
  const HostPlan plan = plan_of(context.topology, context.team.mine());
  ScatterReduce scatter(context, plan, reducer, inputs, output, count);
  Wire wire(
      context, plan, scatter.num_tiles(),
      [&](size_t ring, size_t tile, size_t host) { return scatter.chunk_at(ring, tile, host); },
      [&](const std::byte* incoming, const Wire::Chunk& target) {
        reducer.merge(incoming, target.data, target.data, target.bytes / reducer.partial_bytes());
      });
  run_pipeline(context, scatter, wire, scatter.num_tiles());
  if (scatter.zero_copy()) context.counters.add_zero_copy();
}

}  // namespace mlsys::comm
