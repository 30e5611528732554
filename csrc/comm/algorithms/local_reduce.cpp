// All-reduce (and reduce to a root) inside a host. Three ways with the same bits:
//
// inline  (at most 4 KiB): every rank published its contribution beside its descriptor, so after the arrival
// each
//         rank reduces everything for itself: one barrier in all.
// direct  (all contributions in the shared arena): rank i owns slice i, reads it from all ranks and writes
// the
//         result into all ranks: every byte is read once and written once. The arrival says that inputs are
//         ready, a barrier at the end that results are complete.
// staged  (private memory): tiles go through a ring of slots of each rank; see StagedReduce.
#include <vector>

#include "comm/algorithms/local.h"
#include "comm/local/tile_claims.h"

namespace mlsys::comm {
namespace {

constexpr size_t kGrain = 64;  // elements: slice boundaries on cache lines for every type

void reduce_inline(Context& context, const Reducer& reducer, void* data, size_t count, int root) {
  if (root >= 0 && root != context.team.index()) return;
  std::vector<const void*> sources;
  for (int local = 0; local < context.team.size(); ++local)
    sources.push_back(context.team.inline_payload(local));
  reducer.reduce(sources, std::array{data}, count);
  context.counters.add_shm(count * reducer.element_bytes() * static_cast<size_t>(context.team.size() - 1));
}

void reduce_direct(Context& context, const Reducer& reducer, std::span<std::byte* const> buffers,
                   size_t count, int root) {
  LocalTeam& team = context.team;
  const size_t bytes = count * reducer.element_bytes();
  const size_t tile = TileClaims::tile_bytes(bytes, team.size()) / reducer.element_bytes();
  const size_t targets_each = root < 0 ? buffers.size() : 1;
  std::vector<const void*> sources(buffers.size());
  std::vector<void*> targets(targets_each);
  TileClaims claims(team, 0, (count + tile - 1) / tile);
  claims.run([&](size_t k) {
    const size_t offset = k * tile * reducer.element_bytes();
    const size_t n = std::min(tile, count - k * tile);
    for (size_t local = 0; local < buffers.size(); ++local) sources[local] = buffers[local] + offset;
    for (size_t local = 0; root < 0 && local < buffers.size(); ++local)
      targets[local] = buffers[local] + offset;
    if (root >= 0) targets[0] = buffers[static_cast<size_t>(root)] + offset;
    reducer.reduce(sources, targets, n);
    const bool mine_too = root < 0 || root == team.index();
    const size_t others = sources.size() - 1 + targets.size() - (mine_too ? 1 : 0);
    context.counters.add_shm(n * reducer.element_bytes() * others);
  });
  context.counters.add_zero_copy();
}

// The tiles of private memory on their way through shared memory. Part q of a tile belongs to local rank q.
// In rank r's slot of a tile, part q != r holds r's contribution to q, and part r holds r's result, so each
// rank stages only what others must see: (p-1)/p of the data in, 1/p out.
//
// Rank r publishes tile k (first signal), reduces its part of it when all have published (second signal), and
// collects the others' parts. It publishes kAhead tiles early and collects kLag tiles late, so that a rank
// waits only for one that is more than that behind. Slots: when r publishes tile k + kAhead, it has collected
// tile k - kLag - 1, so all have reduced that tile, and nobody reads r's contributions to it any more. When r
// writes its result of tile k, all have published tile k, hence have collected tile k - kAhead - kLag - 1,
// and nobody reads r's result of that one any more. Both lay kNumSlots tiles before.
constexpr size_t kSlotBytes = 128 << 10;  // the slots of a rank fill half of a 1 MiB second-level cache
constexpr size_t kNumSlots = 4;
constexpr size_t kAhead = 1;
constexpr size_t kLag = 2;
static_assert(kNumSlots >= kAhead + kLag + 1 && kNumSlots * kSlotBytes <= ControlBlock::kStageBytes);

class StagedReduce {
 public:
  StagedReduce(LocalTeam& team, const Reducer& reducer, void* data, size_t count, int root)
      : team_(team),
        reducer_(reducer),
        data_(data),
        count_(count),
        stride_(kSlotBytes / reducer.element_bytes() / static_cast<size_t>(team.size()) / kGrain * kGrain),
        tile_(stride_ * static_cast<size_t>(team.size())),
        num_tiles_((count + tile_ - 1) / tile_),
        me_(team.index()),
        is_target_(root < 0 || root == team.index()) {}

  void run() const {
    for (size_t k = 0; k < std::min(kAhead, num_tiles_); ++k) publish(k);
    for (size_t k = 0; k < num_tiles_ + kLag; ++k) {
      if (k + kAhead < num_tiles_) publish(k + kAhead);
      if (k < num_tiles_) reduce(k);
      if (k >= kLag) collect(k - kLag);
    }
  }

 private:
  // Part `owner` of tile k, in elements of the tensor.
  Range part(size_t k, int owner) const {
    const Range range = part_of(std::min(tile_, count_ - k * tile_), static_cast<size_t>(owner),
                                static_cast<size_t>(team_.size()), kGrain);
    return {k * tile_ + range.first, range.count};
  }
  std::byte* mine(const Range& range) const { return at(data_, range.first * reducer_.element_bytes()); }
  std::byte* staged(int local, size_t k, int owner) const {
    return team_.stage(local) + k % kNumSlots * kSlotBytes +
           static_cast<size_t>(owner) * stride_ * reducer_.element_bytes();
  }

  void publish(size_t k) const {
    for (int owner = 0; owner < team_.size(); ++owner) {
      const Range range = part(k, owner);
      if (owner != me_)
        copy_bytes(staged(me_, k, owner), mine(range), range.count * reducer_.element_bytes());
    }
    team_.signal(LocalTeam::kFirst);
  }

  void reduce(size_t k) const {
    team_.await_all(LocalTeam::kFirst, static_cast<uint32_t>(k + 1));
    const Range range = part(k, me_);
    std::vector<const void*> sources;
    for (int local = 0; local < team_.size(); ++local) {
      sources.push_back(local == me_ ? mine(range) : staged(local, k, me_));
    }
    const std::array<void*, 2> targets{staged(me_, k, me_), mine(range)};
    reducer_.reduce(sources, std::span(targets).first(is_target_ ? 2 : 1), range.count);
    team_.signal(LocalTeam::kSecond);
  }

  void collect(size_t k) const {
    team_.await_all(LocalTeam::kSecond, static_cast<uint32_t>(k + 1));
    for (int owner = 0; is_target_ && owner < team_.size(); ++owner) {
      const Range range = part(k, owner);
      if (owner != me_)
        copy_bytes(mine(range), staged(owner, k, owner), range.count * reducer_.element_bytes());
    }
  }

  LocalTeam& team_;
  const Reducer& reducer_;
  void* data_;
  size_t count_;
  size_t stride_;  // elements: room for a part; the same for a short last tile, whose parts would otherwise
                   // lie over results that others still collect
  size_t tile_;    // elements
  size_t num_tiles_;
  int me_;
  bool is_target_;
};

}  // namespace

void local_reduce(Context& context, const Reducer& reducer, void* data, size_t count, int root) {
  LocalTeam& team = context.team;
  const size_t bytes = count * reducer.element_bytes();
  if (fits_inline(bytes)) return reduce_inline(context, reducer, data, count, root);
  std::vector<std::byte*> buffers;
  bool direct = true;
  for (int local = 0; local < team.size(); ++local) {
    buffers.push_back(team.published(local, team.descriptor(local).arena_offset, bytes));
    direct &= buffers.back() != nullptr;
  }
  if (direct) return reduce_direct(context, reducer, buffers, count, root);
  StagedReduce(team, reducer, data, count, root).run();
  const auto size = static_cast<size_t>(team.size());
  context.counters.add_shm(bytes * 2 * (size - 1) / size);
}

}  // namespace mlsys::comm
