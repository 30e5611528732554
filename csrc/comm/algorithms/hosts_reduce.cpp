// All-reduce and reduce over several hosts.
//
// Large: the tensor is cut into one slice for each host (the unit of the ring), and tile t of all slices
// together passes through shared memory at a time, cut into a part for each ring. Every local rank combines
// the host's contributions to its own rings' parts, rings them, and hands the results to its host. Which
// slice an element belongs to, and with it the order of its sum, depends on the element count and the
// number of hosts alone.
//
// Small: leaders send their host's partial to all other leaders, and every rank combines the partials of all
// hosts for itself, as a balanced tree in host order.
#include "comm/algorithms/hosts.h"
#include "comm/algorithms/hosts_pipeline.h"
#include "comm/algorithms/local.h"

namespace mlsys::comm {
namespace {

class RingReduce final : public TileStages {
 public:
  RingReduce(Context& context, const HostPlan& plan, const Reducer& reducer, void* data, size_t count,
             int root)
      : context_(context),
        team_(context.team),
        plan_(plan),
        reducer_(reducer),
        data_(static_cast<std::byte*>(data)),
        count_(count),
        hosts_(static_cast<size_t>(context.topology.num_hosts())),
        in_place_(team_.size() == 1 && reducer.partial_is_element() && root < 0),
        portion_(room(context.topology, plan, reducer)) {
    for (int local = 0; local < team_.size(); ++local) {
      std::byte* buffer =
          team_.published(local, team_.descriptor(local).arena_offset, count * reducer.element_bytes());
      direct_ &= buffer != nullptr || team_.size() == 1;
      const bool own = local == team_.index();
      buffers_.push_back(own ? data_ : buffer);
      wanting_.push_back(root < 0 || root == context.topology.local_ranks()[static_cast<size_t>(local)]);
    }
  }

  // Elements of a chunk; the same on all hosts, whether their tensors lie in the arena or not.
  static size_t room(const Topology& topology, const HostPlan& plan, const Reducer& reducer) {
    const size_t chunks = kTileSlots * plan.rings.size() * topology.hosts.size();
    const size_t on_the_wire = std::min(kChunkBytes, ControlBlock::kScratchBytes / chunks);
    if (one_rank_each(topology)) return on_the_wire / reducer.partial_bytes();
    return std::min(on_the_wire / reducer.partial_bytes(),
                    ControlBlock::kWireStageBytes / chunks / reducer.element_bytes());
  }

  size_t num_tiles() const {
    const size_t longest = part_of(count_, hosts_ - 1, hosts_).count;
    const size_t tile = plan_.rings.size() * portion_.count;
    return (std::max(longest, part_of(count_, 0, hosts_).count) + tile - 1) / tile;
  }

  Wire::Chunk chunk_at(size_t ring, size_t tile, size_t slice) const {
    const Range range = range_of(ring, tile, slice);
    std::byte* data = in_place_ ? data_ + bytes(range.first) : partial(ring, tile, slice);
    return {data, range.count * reducer_.partial_bytes()};
  }

  void publish(size_t tile) override {
    if (direct_) return;
    for (size_t ring = 0; ring < plan_.rings.size(); ++ring) {
      if (plan_.rings.members[ring][my_host()] == context_.topology.rank) continue;
      for (size_t slice = 0; slice < hosts_; ++slice) {
        const Range range = range_of(ring, tile, slice);
        copy_bytes(staged(team_.index(), ring, tile, slice), data_ + bytes(range.first), bytes(range.count));
      }
    }
  }

  void load(size_t tile) override {
    if (in_place_) return;
    std::vector<const void*> sources(static_cast<size_t>(team_.size()));
    for_mine(tile, [&](size_t ring, size_t slice, Range range) {
      for (int local = 0; local < team_.size(); ++local) {
        const bool reachable = direct_ || local == team_.index();
        sources[static_cast<size_t>(local)] = reachable
                                                  ? buffers_[static_cast<size_t>(local)] + bytes(range.first)
                                                  : staged(local, ring, tile, slice);
      }
      reducer_.reduce_to_partial(sources, partial(ring, tile, slice), range.count);
      context_.counters.add_shm(bytes(range.count) * (sources.size() - 1));
    });
  }

  void finish(size_t tile) override {
    if (in_place_ && !reducer_.divides()) return;
    if (!direct_) return;
    for_mine(tile, [&](size_t ring, size_t slice, Range range) {
      for (int local = 0; local < team_.size(); ++local) {
        if (!wanting_[static_cast<size_t>(local)]) continue;
        reducer_.finish(chunk_at(ring, tile, slice).data,
                        buffers_[static_cast<size_t>(local)] + bytes(range.first), range.count);
        if (local != team_.index()) context_.counters.add_shm(bytes(range.count));
      }
    });
  }

  void collect(size_t tile) override {
    if (direct_ || !wanting_[static_cast<size_t>(team_.index())]) return;
    for (size_t ring = 0; ring < plan_.rings.size(); ++ring) {
      const bool own = plan_.rings.members[ring][my_host()] == context_.topology.rank;
      for (size_t slice = 0; slice < hosts_; ++slice) {
        const Range range = range_of(ring, tile, slice);
        reducer_.finish(partial(ring, tile, slice), data_ + bytes(range.first), range.count);
        if (!own) context_.counters.add_shm(bytes(range.count));
      }
    }
  }

  bool zero_copy() const { return direct_ && team_.size() > 1; }

 private:
  size_t bytes(size_t count) const { return count * reducer_.element_bytes(); }
  size_t my_host() const { return static_cast<size_t>(context_.topology.my_host()); }
  size_t box(size_t ring, size_t tile, size_t slice) const {
    return ((tile % kTileSlots * plan_.rings.size() + ring) * hosts_ + slice) * portion_.count;
  }
  std::byte* staged(int local, size_t ring, size_t tile, size_t slice) const {
    return team_.wire_stage(local) + bytes(box(ring, tile, slice));
  }
  std::byte* partial(size_t ring, size_t tile, size_t slice) const {
    return team_.scratch() + box(ring, tile, slice) * reducer_.partial_bytes();
  }
  // In elements of the tensor.
  Range range_of(size_t ring, size_t tile, size_t slice) const {
    const Range whole = part_of(count_, slice, hosts_);
    const size_t length = plan_.rings.size() * portion_.count;
    const size_t begin = std::min(tile * length, whole.count);
    const Range part =
        part_of(std::min(length, whole.count - begin), ring, plan_.rings.size(), portion_.grain);
    return {whole.first + begin + part.first, part.count};
  }
  template <class Visit>
  void for_mine(size_t tile, Visit visit) const {
    for (const size_t ring : plan_.rings.mine) {
      for (size_t slice = 0; slice < hosts_; ++slice) visit(ring, slice, range_of(ring, tile, slice));
    }
  }

  Context& context_;
  LocalTeam& team_;
  const HostPlan& plan_;
  const Reducer& reducer_;
  std::byte* data_;
  size_t count_;
  size_t hosts_;
  bool in_place_;  // the wire works on the tensor itself
  Portion portion_;
  bool direct_ = true;
  std::vector<std::byte*> buffers_;  // by local rank; of others only when direct_
  std::vector<bool> wanting_;        // by local rank: takes the result
};

// One tile of everything; slice h is host h's partial.
class SmallReduce final : public TileStages {
 public:
  SmallReduce(Context& context, const HostPlan& plan, const Reducer& reducer, void* data, size_t count,
              bool wants_result)
      : context_(context),
        team_(context.team),
        leading_(!plan.rings.mine.empty()),
        reducer_(reducer),
        data_(data),
        count_(count),
        inline_(count * reducer.element_bytes() <= RankSlot::kInlineBytes),
        wants_result_(wants_result) {}

  Wire::Chunk chunk_at(size_t host) const {
    const size_t bytes = count_ * reducer_.partial_bytes();
    return {team_.scratch() + host * bytes, bytes};
  }

  void publish(size_t) override {
    if (!inline_ && !leading_) {
      copy_bytes(team_.wire_stage(team_.index()), data_, count_ * reducer_.element_bytes());
    }
  }

  void load(size_t) override {
    if (!leading_) return;
    std::vector<const void*> sources;
    for (int local = 0; local < team_.size(); ++local) {
      const void* theirs = inline_ ? team_.inline_payload(local) : team_.wire_stage(local);
      sources.push_back(local == team_.index() ? data_ : theirs);
    }
    reducer_.reduce_to_partial(sources, chunk_at(my_host()).data, count_);
    context_.counters.add_shm(count_ * reducer_.element_bytes() * (sources.size() - 1));
  }

  void finish(size_t) override {}

  void collect(size_t) override {
    if (!wants_result_) return;
    std::vector<const void*> partials;
    for (size_t host = 0; host < context_.topology.hosts.size(); ++host) {
      partials.push_back(chunk_at(host).data);
    }
    reducer_.combine_partials(partials, data_, count_);
    if (!leading_) context_.counters.add_shm(count_ * reducer_.partial_bytes() * partials.size());
  }

 private:
  size_t my_host() const { return static_cast<size_t>(context_.topology.my_host()); }

  Context& context_;
  LocalTeam& team_;
  bool leading_;
  const Reducer& reducer_;
  void* data_;
  size_t count_;
  bool inline_;  // contributions came beside the descriptors
  bool wants_result_;
};

}  // namespace

void hosts_reduce(Context& context, const Reducer& reducer, void* data, size_t count, int root) {
  const HostPlan plan = plan_of(context.topology, context.team.mine());
  const bool wants_result = root < 0 || root == context.topology.rank;
  if (is_small(context.topology, context.team.mine())) {
    SmallReduce reduce(context, plan, reducer, data, count, wants_result);
    Wire wire(context, plan, 1, [&](size_t, size_t, size_t host) { return reduce.chunk_at(host); }, nullptr);
    return run_pipeline(context, reduce, wire, 1);
  }
  RingReduce reduce(context, plan, reducer, data, count, root);
  Wire wire(
      context, plan, reduce.num_tiles(),
      [&](size_t ring, size_t tile, size_t slice) { return reduce.chunk_at(ring, tile, slice); },
      [&](const std::byte* incoming, const Wire::Chunk& target) {
        reducer.merge(incoming, target.data, target.data, target.bytes / reducer.partial_bytes());
      });
  run_pipeline(context, reduce, wire, reduce.num_tiles());
  if (reduce.zero_copy()) context.counters.add_zero_copy();
}

}  // namespace mlsys::comm
