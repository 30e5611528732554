// All-reduce (and reduce to a root) of private memory inside a host, through the ranks' rings of slots. Two
// ways with the same bits:
//
// whole   (two ranks): each publishes its tile and reduces all of it for itself: one hand-over a tile, and no
//         more is read from the other rank than its result would take.
// shared  (more ranks): each reduces its part of a tile and publishes the result; see SharedReduce.
#include <array>
#include <vector>

#include "comm/algorithms/local.h"
#include "comm/local/staging.h"

namespace mlsys::comm {
namespace {

constexpr size_t kGrain = 64;  // elements: boundaries on cache lines for every type

void reduce_whole(Context& context, const Reducer& reducer, void* data, size_t count, int root) {
  LocalTeam& team = context.team;
  const int me = team.index();
  const size_t element = reducer.element_bytes();
  const size_t tile = Ring::kSlotBytes / element;
  const bool is_target = root < 0 || root == me;
  const auto elements = [&](size_t k) { return std::min(tile, count - k * tile); };
  std::vector<const void*> sources(static_cast<size_t>(team.size()));
  Ring::run(
      team, (count + tile - 1) / tile,
      [&](size_t k, std::byte* slot) {
        if (root != me) team.copy_out(slot, at(data, k * tile * element), elements(k) * element);
      },
      [&](size_t k) {
        if (!is_target) return;
        std::byte* target = at(data, k * tile * element);
        for (int local = 0; local < team.size(); ++local) {
          sources[static_cast<size_t>(local)] = local == me ? target : Ring::slot(team, local, k);
        }
        reducer.reduce(sources, std::array<void*, 1>{target}, elements(k));
        context.counters.add_shm(elements(k) * element * (sources.size() - 1));
      });
}

// Part q of a tile belongs to local rank q. In rank r's slot of a tile, part q != r holds r's contribution to
// q, and part r holds r's result, so each rank stages only what others must see: (p-1)/p of the data in, 1/p
// out.
//
// Rank r publishes tile k (first signal), reduces its part of it when all have published (second signal), and
// collects the others' parts. It publishes kAhead tiles early and collects kLag tiles late, so that a rank
// waits only for one that is more than that behind. Slots: when r publishes tile k + kAhead, it has collected
// tile k - kLag - 1, so all have reduced that tile, and nobody reads r's contributions to it any more. When r
// writes its result of tile k, all have published tile k, hence have collected tile k - kAhead - kLag - 1,
// and nobody reads r's result of that one any more. Neither is overwritten sooner.
class SharedReduce {
 public:
  SharedReduce(LocalTeam& team, const Reducer& reducer, void* data, size_t count, int root)
      : team_(team),
        reducer_(reducer),
        data_(data),
        count_(count),
        stride_(Ring::kSlotBytes / reducer.element_bytes() / static_cast<size_t>(team.size()) / kGrain *
                kGrain),
        tile_(stride_ * static_cast<size_t>(team.size())),
        num_tiles_((count + tile_ - 1) / tile_),
        me_(team.index()),
        is_target_(root < 0 || root == team.index()) {}

  size_t num_tiles() const { return num_tiles_; }
  void run() const {
    for (size_t k = 0; k < std::min(kAhead, num_tiles_); ++k) publish(k);
    for (size_t k = 0; k < num_tiles_ + kLag; ++k) {
      if (k + kAhead < num_tiles_) publish(k + kAhead);
      if (k < num_tiles_) reduce(k);
      if (k >= kLag && k - kLag < num_tiles_) collect(k - kLag);
    }
  }

 private:
  static constexpr size_t kAhead = Ring::kAhead;
  static constexpr size_t kLag = 2;
  static_assert(Ring::kNumSlots >= kAhead + kLag + 1);

  // Part `owner` of tile k, in elements of the tensor.
  Range part(size_t k, int owner) const {
    const Range range = part_of(std::min(tile_, count_ - k * tile_), static_cast<size_t>(owner),
                                static_cast<size_t>(team_.size()), kGrain);
    return {k * tile_ + range.first, range.count};
  }
  std::byte* mine(const Range& range) const { return at(data_, range.first * reducer_.element_bytes()); }
  std::byte* staged(int local, size_t k, int owner) const {
    return Ring::slot(team_, local, k) + static_cast<size_t>(owner) * stride_ * reducer_.element_bytes();
  }

  void publish(size_t k) const {
    for (int owner = 0; owner < team_.size(); ++owner) {
      const Range range = part(k, owner);
      if (owner != me_) {
        team_.copy_out(staged(me_, k, owner), mine(range), range.count * reducer_.element_bytes());
      }
    }
    team_.signal(LocalTeam::kFirst);
  }

  void reduce(size_t k) const {
    team_.await_all(LocalTeam::kFirst, static_cast<uint32_t>(k + 1));
    const Range range = part(k, me_);
    std::byte* result = staged(me_, k, me_);
    std::vector<const void*> sources;
    for (int local = 0; local < team_.size(); ++local) {
      sources.push_back(local == me_ ? mine(range) : staged(local, k, me_));
    }
    if (is_target_) {
      reducer_.reduce(sources, std::array<void*, 1>{mine(range)}, range.count);
      team_.copy_out(result, mine(range), range.count * reducer_.element_bytes());
    } else {
      reducer_.reduce(sources, std::array<void*, 1>{result}, range.count);
    }
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

void local_reduce_staged(Context& context, const Reducer& reducer, void* data, size_t count, int root) {
  const auto size = static_cast<size_t>(context.team.size());
  if (size == 2) return reduce_whole(context, reducer, data, count, root);
  const SharedReduce reduce(context.team, reducer, data, count, root);
  context.team.run_staged(reduce.num_tiles(), [&] { reduce.run(); });
  context.counters.add_shm(count * reducer.element_bytes() * 2 * (size - 1) / size);
}

}  // namespace mlsys::comm
