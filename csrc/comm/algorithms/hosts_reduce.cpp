// All-reduce over several hosts: reduce inside each host, ring between the leaders, share inside each host.
//
// The tensor is cut into one slice for each host (the unit of the ring); the slices are cut into tiles, and
// tile t of all slices together fills the scratch area. So which slice an element belongs to, and with it the
// order of its sum, depends on the element count and the number of hosts alone. Where every host has one rank
// and partials are elements, the ring runs on the tensor itself.
#include <algorithm>

#include "comm/algorithms/hosts.h"
#include "comm/algorithms/ring.h"

namespace mlsys::comm {
namespace {

class TiledReduce {
 public:
  TiledReduce(Context& context, const Reducer& reducer, void* data, size_t count, bool wants_result)
      : context_(context),
        team_(context.team),
        reducer_(reducer),
        data_(data),
        count_(count),
        hosts_(static_cast<size_t>(context.topology.num_hosts())),
        wants_result_(wants_result) {
    // The tile must be the same on all hosts, whether their tensors lie in the arena or not.
    tile_ = ControlBlock::kScratchBytes / (hosts_ * reducer.partial_bytes());
    if (!one_rank_each(context.topology)) {
      tile_ = std::min(tile_, ControlBlock::kStageBytes / (hosts_ * reducer.element_bytes()));
    }
    for (int local = 0; local < team_.size(); ++local) {
      std::byte* buffer =
          team_.published(local, team_.descriptor(local).arena_offset, count * reducer.element_bytes());
      buffers_.push_back(local == team_.index() ? static_cast<std::byte*>(data) : buffer);
      direct_ &= buffers_.back() != nullptr && (team_.size() == 1 || buffer != nullptr);
    }
  }

  void run() {
    const size_t longest = part_of(count_, hosts_ - 1, hosts_).count;
    for (size_t first = 0; first < std::max(longest, part_of(count_, 0, hosts_).count); first += tile_) {
      if (first != 0) team_.barrier();  // everyone has taken the previous tile out of the scratch area
      if (!direct_) {
        for_slices(first, [&](size_t host, Range r) {
          copy_bytes(staged(team_.index(), host), element_at(data_, r.first), bytes(r.count));
        });
        team_.barrier();
      }
      for_slices(first, [&](size_t host, Range r) { reduce_part(host, r); });
      team_.barrier();
      if (context_.topology.is_leader()) exchange(first);
      team_.barrier();
      if (!wants_result_) continue;
      for_slices(first, [&](size_t host, Range r) {
        reducer_.finish(partial(host, 0), element_at(data_, r.first), r.count);
      });
    }
  }

 private:
  size_t bytes(size_t count) const { return count * reducer_.element_bytes(); }
  std::byte* element_at(void* base, size_t index) const { return at(base, bytes(index)); }
  std::byte* staged(int local, size_t host) const { return team_.stage(local) + bytes(host * tile_); }
  std::byte* partial(size_t host, size_t index) const {
    return team_.scratch() + (host * tile_ + index) * reducer_.partial_bytes();
  }
  Range tile_of(size_t host, size_t first) const {
    const Range slice = part_of(count_, host, hosts_);
    const size_t begin = std::min(first, slice.count);
    return {slice.first + begin, std::min(tile_, slice.count - begin)};
  }
  template <class Visit>
  void for_slices(size_t first, Visit visit) const {
    for (size_t host = 0; host < hosts_; ++host) visit(host, tile_of(host, first));
  }

  // This rank's share of the tile: combined over the ranks of this host.
  void reduce_part(size_t host, Range range) const {
    const Range mine =
        part_of(range.count, static_cast<size_t>(team_.index()), static_cast<size_t>(team_.size()), 64);
    std::vector<const void*> sources;
    for (int local = 0; local < team_.size(); ++local) {
      const std::byte* base =
          direct_ ? element_at(buffers_[static_cast<size_t>(local)], range.first) : staged(local, host);
      sources.push_back(base + bytes(mine.first));
    }
    reducer_.reduce_to_partial(sources, partial(host, mine.first), mine.count);
    context_.counters.add_shm(bytes(mine.count) * (sources.size() - 1));
  }

  void exchange(size_t first) const {
    std::vector<Slice> slices;
    for_slices(first, [&](size_t host, Range r) { slices.push_back({partial(host, 0), r.count}); });
    ring_all_reduce(context_, reducer_, slices);
  }

  Context& context_;
  LocalTeam& team_;
  const Reducer& reducer_;
  void* data_;
  size_t count_;
  size_t hosts_;
  bool wants_result_;
  size_t tile_ = 0;
  bool direct_ = true;
  std::vector<std::byte*> buffers_;
};

}  // namespace

void hosts_reduce(Context& context, const Reducer& reducer, void* data, size_t count, int root) {
  const auto hosts = static_cast<size_t>(context.topology.num_hosts());
  if (one_rank_each(context.topology) && reducer.partial_is_element() && root < 0) {
    std::vector<Slice> slices;
    for (size_t host = 0; host < hosts; ++host) {
      const Range slice = part_of(count, host, hosts);
      slices.push_back({at(data, slice.first * reducer.element_bytes()), slice.count});
    }
    ring_all_reduce(context, reducer, slices);
    if (reducer.divides()) reducer.finish(data, data, count);
    return;
  }
  TiledReduce(context, reducer, data, count, root < 0 || root == context.topology.rank).run();
}

}  // namespace mlsys::comm
