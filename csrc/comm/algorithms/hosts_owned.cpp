#include "comm/algorithms/hosts_owned.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "comm/algorithms/hosts.h"
#include "comm/algorithms/hosts_plan.h"

namespace mlsys::comm {
namespace {

constexpr size_t kAlignment = 64;  // of boxes in the scratch area
// Of what one rank sends of a message: less is not worth a message of its own.
constexpr size_t kLeastShare = 4096;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The scratch area holds, for one tile of every slice: what this host sends about slices of other owners,
// what other hosts sent about its own, and results when they are shared.
class OwnerExchange {
 public:
  OwnerExchange(Context& context, const OwnerProtocol& protocol, const OwnedReduction& reduction)
      : context_(context),
        team_(context.team),
        topology_(context.topology),
        protocol_(protocol),
        reduction_(reduction),
        slices_(reduction.slices),
        hosts_(static_cast<size_t>(context.topology.num_hosts())),
        me_(static_cast<size_t>(context.topology.my_host())),
        rings_(rings_of_all(context.topology)) {
    for (const OwnedSlice& slice : slices_) longest_ = std::max(longest_, slice.count);
    choose_tile();
    place_boxes();
    for (int local = 0; local < team_.size(); ++local) {
      std::byte* buffer = team_.published(local, team_.descriptor(local).arena_offset,
                                          reduction.num_elements * reduction.element_bytes);
      buffers_.push_back(buffer);
      direct_ &= buffer != nullptr;
    }
    direct_ |= team_.size() == 1;
  }

  void run() {
    for (size_t first = 0; first < longest_; first += tile_) {
      first_ = first;
      if (first != 0) team_.barrier();  // everyone has taken the previous tile out of shared memory
      if (!direct_) {
        for (size_t s = 0; s < slices_.size(); ++s) {
          const Range r = tile_of(s);
          copy_bytes(staged(team_.index(), s), slices_[s].data + bytes(r.first), bytes(r.count));
        }
        team_.barrier();
      }
      for (size_t s = 0; s < slices_.size(); ++s) {
        if (!is_mine(s)) contribute(s);
      }
      team_.barrier();
      exchange_messages();
      team_.barrier();
      for (size_t s = 0; s < slices_.size(); ++s) {
        if (is_mine(s)) combine(s);
      }
      if (!reduction_.shares_results) continue;
      team_.barrier();
      exchange_results();
      team_.barrier();
      for (size_t s = 0; s < slices_.size(); ++s) deliver(s);
    }
    if (!reduction_.shares_results) team_.barrier();  // nobody reads this rank's input any more
  }

 private:
  size_t bytes(size_t count) const { return count * reduction_.element_bytes; }
  bool is_mine(size_t s) const { return static_cast<size_t>(slices_[s].host) == me_; }

  // The same on all hosts: as many grains as fit where most is needed.
  void choose_tile() {
    size_t most = 0;
    size_t sent_by_all = 0;
    const auto grain_bytes = [&](size_t host) {
      return aligned(protocol_.message_bytes(static_cast<int>(host), OwnerProtocol::kGrain));
    };
    for (size_t host = 0; host < hosts_; ++host) sent_by_all += grain_bytes(host);
    for (size_t host = 0; host < hosts_; ++host) {
      size_t owned = 0;
      for (const OwnedSlice& slice : slices_) owned += static_cast<size_t>(slice.host) == host;
      most = std::max(
          most, (slices_.size() - owned) * grain_bytes(host) + owned * (sent_by_all - grain_bytes(host)));
    }
    if (reduction_.shares_results) {
      most += slices_.size() * aligned(protocol_.result_bytes(OwnerProtocol::kGrain));
    }
    tile_ = ControlBlock::kScratchBytes / most * OwnerProtocol::kGrain;
    if (!one_rank_each(topology_)) {
      const size_t staged = ControlBlock::kStageBytes / bytes(OwnerProtocol::kGrain) / slices_.size();
      tile_ = std::min(tile_, staged * OwnerProtocol::kGrain);
    }
    if (tile_ == 0) {
      throw std::length_error("a reduction over " + std::to_string(hosts_) + " hosts with " +
                              std::to_string(slices_.size()) +
                              " owners has no room for a tile in shared memory. Use fewer ranks a group.");
    }
  }

  void place_boxes() {
    std::byte* next = team_.scratch();
    const auto place = [&](size_t size) { return std::exchange(next, next + aligned(size)); };
    for (size_t s = 0; s < slices_.size(); ++s) {
      std::vector<std::byte*>& boxes = messages_.emplace_back(hosts_, nullptr);
      for (size_t host = 0; host < hosts_; ++host) {
        // Of an own slice, one box for each other host; of another's, the box of this host.
        if (is_mine(s) == (host == me_)) continue;
        boxes[host] = place(protocol_.message_bytes(static_cast<int>(host), tile_));
      }
      results_.push_back(reduction_.shares_results ? place(protocol_.result_bytes(tile_)) : nullptr);
    }
  }

  // The present tile of slice s, in elements of the slice.
  Range tile_of(size_t s) const {
    const size_t begin = std::min(first_, slices_[s].count);
    return {begin, std::min(tile_, slices_[s].count - begin)};
  }
  std::byte* staged(int local, size_t s) const { return team_.stage(local) + bytes(s * tile_); }

  OwnedPart part_for(size_t s, size_t part, size_t parts) const {
    const Range tile = tile_of(s);
    const Range mine = part_of(tile.count, part, parts, OwnerProtocol::kGrain);
    return {slices_[s].offset + tile.first + mine.first, mine.first, mine.count, tile.count};
  }
  std::vector<const void*> sources_of(size_t s, const OwnedPart& part) const {
    std::vector<const void*> sources;
    const size_t in_slice = bytes(part.element - slices_[s].offset);
    for (int local = 0; local < team_.size(); ++local) {
      if (local == team_.index()) {
        sources.push_back(slices_[s].data + in_slice);
      } else if (direct_) {
        sources.push_back(buffers_[static_cast<size_t>(local)] + bytes(part.element));
      } else {
        sources.push_back(staged(local, s) + bytes(part.first));
      }
    }
    context_.counters.add_shm(bytes(part.count) * (sources.size() - 1));
    return sources;
  }

  void contribute(size_t s) const {
    const OwnedPart part = part_for(s, static_cast<size_t>(team_.index()), static_cast<size_t>(team_.size()));
    if (part.count != 0) protocol_.contribute(part, sources_of(s, part), messages_[s][me_]);
  }

  void combine(size_t s) const {
    const OwnedSlice& slice = slices_[s];
    if (slice.local >= 0 && slice.local != team_.index()) return;
    const OwnedPart part =
        slice.local >= 0 ? part_for(s, 0, 1)
                         : part_for(s, static_cast<size_t>(team_.index()), static_cast<size_t>(team_.size()));
    if (part.count == 0) return;
    const std::vector<const std::byte*> messages(messages_[s].begin(), messages_[s].end());
    std::byte* result = reduction_.shares_results ? results_[s] : reduction_.output + bytes(first_);
    protocol_.combine(part, sources_of(s, part), messages, result);
  }

  void deliver(size_t s) const {
    const Range tile = tile_of(s);
    if (tile.count == 0) return;
    std::byte* target = reduction_.output + bytes(slices_[s].offset + tile.first);
    protocol_.deliver(results_[s], target, tile.count);
    context_.counters.add_shm(protocol_.result_bytes(tile.count));
  }

  // Bytes that go from one host to another, of which each ring carries its part: every rank is on the wire.
  class Parcels {
   public:
    explicit Parcels(const Rings& rings) : rings_(rings) {}

    void send(int to, const std::byte* data, size_t size) {
      each(to, size, [&](int peer, Range part) { sends_.push_back({peer, data + part.first, part.count}); });
    }
    void receive(int from, std::byte* data, size_t size) {
      each(from, size,
           [&](int peer, Range part) { receives_.push_back({peer, data + part.first, part.count}); });
    }
    void transfer(Mesh& mesh) const { mesh.transfer(sends_, receives_); }

   private:
    template <class Visit>
    void each(int host, size_t size, Visit visit) const {
      for (const size_t ring : rings_.mine) {
        const Range part = part_of(size, ring, rings_.size(), kLeastShare);
        if (part.count != 0) visit(rings_.members[ring][static_cast<size_t>(host)], part);
      }
    }

    const Rings& rings_;
    std::vector<Outgoing> sends_;
    std::vector<Incoming> receives_;
  };

  void exchange_messages() const {
    Parcels parcels(rings_);
    for (size_t s = 0; s < slices_.size(); ++s) {
      const size_t count = tile_of(s).count;
      if (!is_mine(s)) {
        parcels.send(slices_[s].host, messages_[s][me_],
                     protocol_.message_bytes(static_cast<int>(me_), count));
        continue;
      }
      for (size_t host = 0; host < hosts_; ++host) {
        if (host == me_) continue;
        parcels.receive(static_cast<int>(host), messages_[s][host],
                        protocol_.message_bytes(static_cast<int>(host), count));
      }
    }
    parcels.transfer(*context_.mesh);
  }

  void exchange_results() const {
    Parcels parcels(rings_);
    for (size_t s = 0; s < slices_.size(); ++s) {
      const size_t size = protocol_.result_bytes(tile_of(s).count);
      if (!is_mine(s)) {
        parcels.receive(slices_[s].host, results_[s], size);
        continue;
      }
      for (size_t host = 0; host < hosts_; ++host) {
        if (host != me_) parcels.send(static_cast<int>(host), results_[s], size);
      }
    }
    parcels.transfer(*context_.mesh);
  }

  Context& context_;
  LocalTeam& team_;
  const Topology& topology_;
  const OwnerProtocol& protocol_;
  const OwnedReduction& reduction_;
  const std::vector<OwnedSlice>& slices_;
  size_t hosts_;
  size_t me_;
  Rings rings_;
  size_t longest_ = 0;
  size_t tile_ = 0;
  size_t first_ = 0;  // of the present tile, in elements of every slice
  bool direct_ = true;
  std::vector<std::byte*> buffers_;
  std::vector<std::vector<std::byte*>> messages_;  // [slice][host]
  std::vector<std::byte*> results_;
};

}  // namespace

void reduce_by_owners(Context& context, const OwnerProtocol& protocol, const OwnedReduction& reduction) {
  OwnerExchange(context, protocol, reduction).run();
}

OwnedReduction owned_by_hosts(const Topology& topology, void* data, size_t count, size_t element_bytes) {
  OwnedReduction reduction;
  reduction.element_bytes = element_bytes;
  reduction.num_elements = count;
  reduction.output = static_cast<std::byte*>(data);
  const auto hosts = static_cast<size_t>(topology.num_hosts());
  for (size_t host = 0; host < hosts; ++host) {
    const Range slice = part_of(count, host, hosts, OwnerProtocol::kGrain);
    reduction.slices.push_back(
        {at(data, slice.first * element_bytes), slice.count, slice.first, static_cast<int>(host), -1});
  }
  return reduction;
}

}  // namespace mlsys::comm
