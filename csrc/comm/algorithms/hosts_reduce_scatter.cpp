// Reduce-scatter over several hosts. For tile t of every rank's part: the ranks of a host reduce among
// themselves, leaders send each other the partials of the receiving host's ranks (one exchange of all pairs,
// every byte crosses the network once), and each rank combines its own partials in host order. Where every
// host has one rank, raw contributions are sent and combined in rank order, so that nothing is widened on the
// wire.
#include <array>

#include "comm/algorithms/hosts.h"

namespace mlsys::comm {
namespace {

void scatter_flat(Context& context, const Reducer& reducer, std::span<const void* const> inputs, void* output,
                  size_t count) {
  const int size = context.topology.size;
  const int me = context.topology.rank;
  const size_t element = reducer.element_bytes();
  const size_t tile = ControlBlock::kScratchBytes / (static_cast<size_t>(size) * element);
  for (size_t first = 0; first < count; first += tile) {
    const size_t n = std::min(tile, count - first);
    std::vector<Outgoing> sends;
    std::vector<Incoming> receives;
    std::vector<const void*> sources;
    for (int rank = 0; rank < size; ++rank) {
      const auto slot = static_cast<size_t>(rank);
      std::byte* inbox = context.team.scratch() + slot * tile * element;
      const std::byte* own = at(inputs[slot], first * element);
      sources.push_back(rank == me ? own : inbox);
      if (rank == me) continue;
      sends.push_back({rank, own, n * element});
      receives.push_back({rank, inbox, n * element});
    }
    context.mesh->transfer(sends, receives);
    reducer.reduce(sources, std::array<void*, 1>{at(output, first * element)}, n);
  }
}

class TiledScatter {
 public:
  TiledScatter(Context& context, const Reducer& reducer, std::span<const void* const> inputs, void* output,
               size_t count)
      : context_(context),
        team_(context.team),
        topology_(context.topology),
        reducer_(reducer),
        inputs_(inputs),
        output_(output),
        count_(count) {
    size_t most_local = 0;
    for (const std::vector<int>& host : topology_.hosts) most_local = std::max(most_local, host.size());
    const auto size = static_cast<size_t>(topology_.size);
    const size_t boxes = size + topology_.hosts.size() * most_local;
    tile_ = std::min(ControlBlock::kScratchBytes / (boxes * reducer.partial_bytes()),
                     ControlBlock::kStageBytes / (size * reducer.element_bytes()));
    size_t position = 0;
    for (const std::vector<int>& host : topology_.hosts) {
      first_of_host_.push_back(position);
      position += host.size();
    }
  }

  void run() {
    for (size_t first = 0; first < count_; first += tile_) {
      const size_t n = std::min(tile_, count_ - first);
      const size_t element = reducer_.element_bytes();
      for (int rank = 0; rank < topology_.size; ++rank) {
        copy_bytes(staged(team_.index(), rank), at(inputs_[static_cast<size_t>(rank)], first * element),
                   n * element);
      }
      team_.barrier();
      for (int rank = 0; rank < topology_.size; ++rank) reduce_part(rank, n);
      team_.barrier();
      if (topology_.is_leader()) exchange();
      team_.barrier();
      combine(first, n);
      // The next tile's first barrier keeps the scratch area until all have combined; staging is free
      // already.
    }
  }

 private:
  std::byte* staged(int local, int rank) const {
    return team_.stage(local) + static_cast<size_t>(rank) * tile_ * reducer_.element_bytes();
  }
  // This host's partial of `rank`'s part; the ranks of one host lie together.
  std::byte* partial(int rank) const {
    const size_t position = first_of_host_[static_cast<size_t>(topology_.host_of[rank])] +
                            static_cast<size_t>(topology_.local_of[rank]);
    return team_.scratch() + position * tile_ * reducer_.partial_bytes();
  }
  // What `host` sent for the ranks of this host.
  std::byte* inbox(size_t host, size_t local) const {
    const size_t box = static_cast<size_t>(topology_.size) + host * static_cast<size_t>(team_.size()) + local;
    return team_.scratch() + box * tile_ * reducer_.partial_bytes();
  }

  void reduce_part(int rank, size_t n) const {
    const Range mine = part_of(n, static_cast<size_t>(team_.index()), static_cast<size_t>(team_.size()), 64);
    std::vector<const void*> sources;
    for (int local = 0; local < team_.size(); ++local) {
      sources.push_back(staged(local, rank) + mine.first * reducer_.element_bytes());
    }
    reducer_.reduce_to_partial(sources, partial(rank) + mine.first * reducer_.partial_bytes(), mine.count);
    context_.counters.add_shm(mine.count * reducer_.element_bytes() * (sources.size() - 1));
  }

  void exchange() const {
    const size_t box = tile_ * reducer_.partial_bytes();
    std::vector<Outgoing> sends;
    std::vector<Incoming> receives;
    for (size_t host = 0; host < topology_.hosts.size(); ++host) {
      if (static_cast<int>(host) == topology_.my_host()) continue;
      const int leader = topology_.leader_of(static_cast<int>(host));
      sends.push_back({leader, partial(leader), topology_.hosts[host].size() * box});
      receives.push_back({leader, inbox(host, 0), static_cast<size_t>(team_.size()) * box});
    }
    context_.mesh->transfer(sends, receives);
  }

  void combine(size_t first, size_t n) const {
    std::vector<const void*> partials;
    for (size_t host = 0; host < topology_.hosts.size(); ++host) {
      const bool own = static_cast<int>(host) == topology_.my_host();
      partials.push_back(own ? partial(topology_.rank) : inbox(host, static_cast<size_t>(team_.index())));
    }
    reducer_.combine_partials(partials, at(output_, first * reducer_.element_bytes()), n);
  }

  Context& context_;
  LocalTeam& team_;
  const Topology& topology_;
  const Reducer& reducer_;
  std::span<const void* const> inputs_;
  void* output_;
  size_t count_;
  size_t tile_ = 0;
  std::vector<size_t> first_of_host_;
};

}  // namespace

void hosts_reduce_scatter(Context& context, const Reducer& reducer, std::span<const void* const> inputs,
                          void* output, size_t count) {
  if (one_rank_each(context.topology)) return scatter_flat(context, reducer, inputs, output, count);
  TiledScatter(context, reducer, inputs, output, count).run();
}

}  // namespace mlsys::comm
