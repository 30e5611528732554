// All-reduce (and reduce to a root) inside a host. Three ways with the same bits:
//
// published  (short, and not in the arena): every rank published its contribution with its descriptor, so
//            after the arrival each rank reduces everything for itself: one barrier in all.
// direct     (all contributions in the shared arena): tiles of the tensor are read from all ranks, and the
//            result is written into all ranks: every byte is read once and written once. Whoever comes takes
//            the next tile.
// staged     (private memory): through the ranks' rings; see local_reduce_staged.cpp.
#include <vector>

#include "comm/algorithms/local.h"
#include "comm/local/tile_claims.h"

namespace mlsys::comm {
namespace {

// Where each rank's contribution of `bytes` lies in shared memory; empty when that is not so for all.
template <class Find>
std::vector<const std::byte*> find_all(const LocalTeam& team, Find find) {
  std::vector<const std::byte*> found;
  for (int local = 0; local < team.size(); ++local) {
    found.push_back(find(local));
    if (found.back() == nullptr) return {};
  }
  return found;
}

void reduce_published(Context& context, const Reducer& reducer, std::span<const std::byte* const> payloads,
                      void* data, size_t count, int root) {
  if (root >= 0 && root != context.team.index()) return;
  const std::vector<const void*> sources(payloads.begin(), payloads.end());
  reducer.reduce(sources, std::array{data}, count);
  context.counters.add_shm(count * reducer.element_bytes() * (sources.size() - 1));
}

void reduce_direct(Context& context, const Reducer& reducer, std::span<const std::byte* const> buffers,
                   size_t count, int root) {
  LocalTeam& team = context.team;
  const size_t element = reducer.element_bytes();
  const size_t tile = TileClaims::tile_bytes(count * element, team.size()) / element;
  const bool mine_too = root < 0 || root == team.index();
  std::vector<const void*> sources(buffers.size());
  std::vector<void*> targets(root < 0 ? buffers.size() : 1);
  TileClaims claims(team, 0, (count + tile - 1) / tile);
  claims.run([&](size_t k) {
    const size_t n = std::min(tile, count - k * tile);
    for (size_t local = 0; local < buffers.size(); ++local) {
      sources[local] = buffers[local] + k * tile * element;
      if (root < 0) targets[local] = const_cast<void*>(sources[local]);
    }
    if (root >= 0) targets[0] = const_cast<void*>(sources[static_cast<size_t>(root)]);
    reducer.reduce(sources, targets, n);
    const size_t others = sources.size() - 1 + targets.size() - (mine_too ? 1 : 0);
    context.counters.add_shm(n * element * others);
  });
  context.counters.add_zero_copy();
}

}  // namespace

void local_reduce(Context& context, const Reducer& reducer, void* data, size_t count, int root) {
  const LocalTeam& team = context.team;
  const size_t bytes = count * reducer.element_bytes();
  const auto payloads = find_all(team, [&](int local) { return team.payload(local, bytes); });
  if (!payloads.empty()) return reduce_published(context, reducer, payloads, data, count, root);
  const auto buffers = find_all(
      team, [&](int local) { return team.published(local, team.descriptor(local).arena_offset, bytes); });
  if (!buffers.empty()) return reduce_direct(context, reducer, buffers, count, root);
  local_reduce_staged(context, reducer, data, count, root);
}

}  // namespace mlsys::comm
