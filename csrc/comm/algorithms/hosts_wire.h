// The wire's side of an operation between hosts: runs a schedule on the chunks of many tiles at once.
//
// A tile is what passes through shared memory at a time; of each tile, each ring has one chunk a slice.
// Messages between two ranks have one order that both ends derive from the schedule: step s of tile t comes
// in wave t * D + s, where D keeps at most kTilesUnderWay tiles on the wire, and within a wave older tiles
// come first. In a steady state the messages of a wave depend on the wave before alone, so the next chunk
// arrives while this one is combined, and the wire does not run dry at the end of a step.
#pragma once

#include <deque>
#include <functional>
#include <vector>

#include "comm/algorithms/context.h"
#include "comm/algorithms/hosts_plan.h"

namespace mlsys::comm {

// Tiles between a rank's first touch of shared memory and its last: those on the wire, and one or two ahead
// and behind.
constexpr size_t kTileSlots = 6;
constexpr size_t kTilesUnderWay = 4;
static_assert(kTileSlots > kTilesUnderWay);
// Of a message on the wire, in bytes; smaller where the slots would not hold it.
constexpr size_t kChunkBytes = Mesh::kPieceBytes;

class Wire {
 public:
  struct Chunk {
    std::byte* data = nullptr;
    size_t bytes = 0;
  };
  // The same sizes on all hosts. Called for tiles that are loaded (and, for what is merged, only for the
  // size, before that).
  using ChunkAt = std::function<Chunk(size_t ring, size_t tile, size_t slice)>;
  using Merge = std::function<void(const std::byte* incoming, const Chunk& target)>;

  // `merge` may be empty when the schedule merges nothing.
  Wire(Context& context, const HostPlan& plan, size_t num_tiles, ChunkAt chunk_at, Merge merge);

  // The first `num_tiles` tiles are ready to be sent.
  void set_loaded(size_t num_tiles) { num_loaded_ = num_tiles; }
  // Posts what may be posted and takes what has come; true when there was any. Moves no bytes itself.
  bool progress();
  // The first so many tiles are complete on this rank: nothing of them is sent or received any more.
  size_t num_done();

 private:
  struct Move {
    uint32_t tile;
    uint16_t step;
    uint16_t ring;  // index into plan_.rings.mine
  };
  struct Sent {
    Mesh::Message message;
    uint32_t tile;
  };

  bool take_received();
  bool post_receives();
  bool post_sends();
  bool may_send(const Move& move) const;
  size_t ring_of(const Move& move) const { return plan_.rings.mine[move.ring]; }
  int peer_of(const Move& move, int host) const {
    return plan_.rings.members[ring_of(move)][static_cast<size_t>(host)];
  }
  int lane_of(const Move& move) const;
  size_t& steps_received(const Move& move) {
    return steps_received_[move.tile * plan_.rings.mine.size() + move.ring];
  }

  Mesh& mesh_;
  const HostPlan& plan_;
  ChunkAt chunk_at_;
  Merge merge_;
  std::vector<size_t> needs_;  // by step: a send needs the receives of so many steps
  std::vector<Move> sends_, receives_;
  std::vector<std::vector<std::byte>> inboxes_;
  std::deque<Mesh::Message> arriving_;  // receives_[num_received_ ...]
  std::deque<Sent> leaving_;
  std::vector<size_t> steps_received_;
  std::vector<size_t> moves_left_;  // by tile
  size_t num_loaded_ = 0;
  size_t num_done_ = 0;
  size_t num_sent_ = 0;      // posted
  size_t num_received_ = 0;  // taken
};

}  // namespace mlsys::comm
