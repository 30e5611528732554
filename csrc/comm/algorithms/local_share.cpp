// Broadcast, all-gather and gather inside a host: one buffer a source, the same for all who read it.
//
// inline  (at most 4 KiB): the sources published it beside their descriptors; readers copy it after the
// arrival. direct  (all sources in the shared arena): readers copy from the source itself; a barrier at the
// end, because a
//         source must not change its buffer before.
// staged  tiles through shared memory, double-buffered as in local_reduce_scatter.cpp.
#include <vector>

#include "comm/algorithms/local.h"

namespace mlsys::comm {
namespace {

bool is_source(int local, int root) { return root < 0 || root == local; }

}  // namespace

void local_share(Context& context, const void* input, std::span<void* const> outputs, size_t bytes,
                 int root) {
  LocalTeam& team = context.team;
  const int me = team.index();
  const auto wants = [&](int local) {
    return is_source(local, root) && local != me && outputs[static_cast<size_t>(local)] != nullptr;
  };
  for (int local = 0; local < team.size(); ++local) {
    if (wants(local)) context.counters.add_shm(bytes);
  }
  if (is_source(me, root) && outputs[static_cast<size_t>(me)] != nullptr) {
    copy_bytes(outputs[static_cast<size_t>(me)], input, bytes);
  }
  bool direct = true;
  std::vector<const std::byte*> sources(static_cast<size_t>(team.size()), nullptr);
  for (int local = 0; local < team.size(); ++local) {
    if (!is_source(local, root)) continue;
    auto& source = sources[static_cast<size_t>(local)];
    source = fits_inline(bytes) ? team.inline_payload(local)
                                : team.published(local, team.descriptor(local).arena_offset, bytes);
    direct &= source != nullptr;
  }
  if (direct) {
    for (int local = 0; local < team.size(); ++local) {
      const auto slot = static_cast<size_t>(local);
      if (wants(local)) copy_bytes(outputs[slot], sources[slot], bytes);
    }
    if (fits_inline(bytes)) return;
    team.barrier();
    context.counters.add_zero_copy();
    return;
  }
  const size_t tile = ControlBlock::kTileBytes;
  const size_t num_tiles = (bytes + tile - 1) / tile;
  for (size_t k = 0; k < num_tiles; ++k) {
    const size_t n = std::min(tile, bytes - k * tile);
    if (k >= 2) team.await_all(LocalTeam::kSecond, static_cast<uint32_t>(k - 1));
    if (is_source(me, root)) copy_bytes(team.stage(me) + (k & 1) * tile, at(input, k * tile), n);
    team.signal(LocalTeam::kFirst);
    for (int local = 0; local < team.size(); ++local) {
      if (!wants(local)) continue;
      team.await(LocalTeam::kFirst, local, static_cast<uint32_t>(k + 1));
      copy_bytes(at(outputs[static_cast<size_t>(local)], k * tile), team.stage(local) + (k & 1) * tile, n);
    }
    team.signal(LocalTeam::kSecond);
  }
}

}  // namespace mlsys::comm
