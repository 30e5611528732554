// Broadcast, all-gather and gather inside a host: one buffer a source, the same for all who read it.
//
// published  (short, and not in the arena): a source published it with its descriptor; readers copy it after
//            the arrival.
// direct     (in the shared arena): readers copy from the source itself; a barrier at the end, because a
//            source must not change its buffer before.
// staged     tiles through the sources' rings, when some source is neither.
#include <vector>

#include "comm/algorithms/local.h"
#include "comm/local/staging.h"
#include "core/streaming.h"

namespace mlsys::comm {
namespace {

bool is_source(int local, int root) { return root < 0 || root == local; }

}  // namespace

void local_share(Context& context, const void* input, std::span<void* const> outputs, size_t bytes,
                 int root) {
  LocalTeam& team = context.team;
  const int me = team.index();
  const auto slot = [](int local) { return static_cast<size_t>(local); };
  std::vector<int> wanted;
  bool staged = false, in_arena = false;
  std::vector<const std::byte*> sources(static_cast<size_t>(team.size()), nullptr);
  for (int local = 0; local < team.size(); ++local) {
    if (!is_source(local, root)) continue;
    if (local != me && outputs[slot(local)] != nullptr) wanted.push_back(local);
    sources[slot(local)] = team.payload(local, bytes);
    if (sources[slot(local)] != nullptr) continue;
    sources[slot(local)] = team.published(local, team.descriptor(local).arena_offset, bytes);
    (sources[slot(local)] == nullptr ? staged : in_arena) = true;
  }
  context.counters.add_shm(bytes * wanted.size());
  const bool keeps_own = is_source(me, root) && outputs[slot(me)] != nullptr;
  // A broadcast through the rings is faster when readers take it from, and leave it in, the caches.
  const size_t num_streamed = root < 0 ? sources.size() : staged ? 0 : 1;
  const Copy copy = copy_for_result(bytes * num_streamed);
  if (!staged) {
    if (keeps_own) copy(outputs[slot(me)], input, bytes);
    for (const int local : wanted) copy(outputs[slot(local)], sources[slot(local)], bytes);
    if (!in_arena) return;
    team.barrier();
    return context.counters.add_zero_copy();
  }
  constexpr size_t kTile = Ring::kSlotBytes;
  const auto length = [&](size_t k) { return std::min(kTile, bytes - k * kTile); };
  Ring::run(
      team, (bytes + kTile - 1) / kTile,
      [&](size_t k, std::byte* target) {
        if (is_source(me, root)) team.copy_out(target, at(input, k * kTile), length(k));
      },
      [&](size_t k) {
        if (keeps_own) copy(at(outputs[slot(me)], k * kTile), at(input, k * kTile), length(k));
        for (const int local : wanted) {
          copy(at(outputs[slot(local)], k * kTile), Ring::slot(team, local, k), length(k));
        }
      });
}

}  // namespace mlsys::comm
