#include "comm/local/tile_claims.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace mlsys::comm {
namespace {

constexpr size_t kSmallestTile = 32 << 10;
constexpr size_t kLargestTile = 256 << 10;
constexpr size_t kTilesPerRank = 4;

}  // namespace

TileClaims::TileClaims(LocalTeam& team, size_t phase, size_t num_tiles)
    : team_(team), set_(team.claim_set(phase)), num_tiles_(static_cast<uint32_t>(num_tiles)) {
  // take() of every rank may count a little beyond the last tile.
  if (num_tiles > std::numeric_limits<uint32_t>::max() / 2) {
    throw std::logic_error(std::to_string(num_tiles) + " tiles are more than can be claimed.");
  }
}

bool TileClaims::take(size_t* tile) {
  const uint32_t next = set_.next.fetch_add(1, std::memory_order_relaxed);
  if (next >= num_tiles_) return false;
  team_.set_working(true);
  *tile = next;
  return true;
}

void TileClaims::finish() {
  team_.set_working(false);
  team_.count_done(set_, num_tiles_);
}

void TileClaims::await_all() { team_.await_done(set_, num_tiles_); }

size_t TileClaims::tile_bytes(size_t bytes, int num_ranks) {
  const size_t share = bytes / (kTilesPerRank * static_cast<size_t>(num_ranks));
  return std::clamp(share, kSmallestTile, kLargestTile) / 64 * 64;
}

}  // namespace mlsys::comm
