// Tiles on their way through shared memory and over the wire, several at a time.
//
//   publish   every rank puts what others of its host need of the tile where they can read it
//   load      every rank combines the host's contributions to the chunks of its own rings
//   (wire)    the schedule runs on those chunks
//   finish    every rank makes its chunks' results readable
//   collect   every rank takes the results
//
// Neither the wire nor the host waits for the other as long as there is a tile to work on. Two signals do:
// the first says "published", the second "finished". A rank publishes tile k + kTileSlots only after it
// has collected tile k. So when everyone has published tile k + kTileSlots, everyone has collected tile k,
// and its slot may be loaded again; and when a rank has collected tile k, all have finished it, hence loaded
// it, and nobody reads what this rank had published of it any more.
#pragma once

#include <stdexcept>

#include "comm/algorithms/hosts_wire.h"

namespace mlsys::comm {

// How many elements a ring takes of a tile when there is room for `room` of them, and on what boundaries:
// cache lines of every type, unless there are so many ranks that the room is smaller than that.
struct Portion {
  static constexpr size_t kGrain = 64;

  explicit Portion(size_t room)
      : count(room >= kGrain ? room / kGrain * kGrain : room), grain(room >= kGrain ? kGrain : 1) {
    if (room == 0) throw std::length_error("too many ranks and hosts for the shared memory between them");
  }

  size_t count;
  size_t grain;
};

class TileStages {
 public:
  virtual ~TileStages() = default;
  virtual void publish(size_t tile) = 0;
  virtual void load(size_t tile) = 0;
  virtual void finish(size_t tile) = 0;
  virtual void collect(size_t tile) = 0;
};

void run_pipeline(Context& context, TileStages& stages, Wire& wire, size_t num_tiles);

}  // namespace mlsys::comm
