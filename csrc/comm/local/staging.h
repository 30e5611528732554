// Private memory on its way through shared memory, tile by tile.
//
// Each rank has a ring of slots that it alone writes. publish(k, slot) puts what others need of tile k into
// this rank's slot; consume(k) runs when all ranks have published tile k and may read every slot_of(k).
//
// Every rank publishes kAhead tiles early, and waits for all ranks in every tile (also one that has nothing
// to read), so one counter tells both that a tile is there and that old ones were consumed: before this rank
// publishes tile k + kAhead it has seen all publish tile k - 1, which each did after it had consumed tile
// k - 2 - kAhead. The slot about to be overwritten holds tile k + kAhead - kNumSlots, which is not later.
#pragma once

#include <algorithm>
#include <cstddef>

#include "comm/local/local_team.h"

namespace mlsys::comm {

template <size_t kBytes>
struct SlotRing {
  static constexpr size_t kSlotBytes = kBytes;
  static constexpr size_t kNumSlots = 6;
  static constexpr size_t kAhead = 2;
  static_assert(kNumSlots >= 2 * kAhead + 2 && kNumSlots * kSlotBytes <= ControlBlock::kStageBytes);

  static std::byte* slot(const LocalTeam& team, int local, size_t k) {
    return team.stage(local) + k % kNumSlots * kSlotBytes;
  }

  template <class Publish, class Consume>
  static void run(LocalTeam& team, size_t num_tiles, Publish publish, Consume consume) {
    const auto publish_tile = [&](size_t k) {
      publish(k, slot(team, team.index(), k));
      team.signal(LocalTeam::kFirst);
    };
    team.run_staged(num_tiles, [&] {
      for (size_t k = 0; k < std::min(kAhead, num_tiles); ++k) publish_tile(k);
      for (size_t k = 0; k < num_tiles; ++k) {
        if (k + kAhead < num_tiles) publish_tile(k + kAhead);
        team.await_all(LocalTeam::kFirst, static_cast<uint32_t>(k + 1));
        consume(k);
      }
    });
  }
};

// Two slots ahead and the one in use fill less than half of a 1 MiB second-level cache.
using Ring = SlotRing<size_t{128} << 10>;
// Where a slot is divided among many readers: half as many turns, each of pieces that are worth one.
using WideRing = SlotRing<size_t{256} << 10>;

}  // namespace mlsys::comm
