// The work of an operation cut into tiles that any rank of the host may do.
//
// Where all buffers lie in shared memory it does not matter who computes what: whoever comes takes the next
// tile, and the work is done when every tile is, on whatever rank. So a rank that is descheduled (more ranks
// than cores), or on a slow core, holds nobody up but for the one tile it may be in. Results are the same
// bits, because an element's value does not depend on who computes it.
//
//   TileClaims claims(team, 0, num_tiles);
//   claims.run([&](size_t tile) { ... });   // returns when all tiles are complete
//
// All ranks of the host must make the same claims with the same number of tiles. An operation may use several
// phases, each once: phase 1 begins where all know that phase 0 is complete.
#pragma once

#include <cstddef>

#include "comm/local/local_team.h"

namespace mlsys::comm {

class TileClaims {
 public:
  TileClaims(LocalTeam& team, size_t phase, size_t num_tiles);

  // Takes the next tile; false when none is left.
  bool take(size_t* tile);
  // The tile taken last is complete: what this rank stored before is visible to all who see the work
  // complete.
  void finish();
  // Waits until all tiles are complete on all ranks. Throws as every wait of the team does.
  void await_all();

  template <class Body>
  void run(Body body) {
    for (size_t tile = 0; take(&tile);) {
      body(tile);
      finish();
    }
    await_all();
  }

  // How large tiles should be, in bytes of each buffer, for a buffer of so many bytes: large enough for the
  // prefetchers, small enough that the ranks finish at about the same time.
  static size_t tile_bytes(size_t bytes, int num_ranks);

 private:
  LocalTeam& team_;
  ClaimSet& set_;
  uint32_t num_tiles_;
};

}  // namespace mlsys::comm
