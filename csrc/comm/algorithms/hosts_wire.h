// The wire's side of an operation between hosts: runs a schedule on the chunks of many tiles at once.
//
// A tile is what passes through shared memory at a time; of each tile, each ring has one chunk a slice.
// Messages have one order that both ends derive from the schedule: step s of tile t comes in wave t * D + s,
// where D keeps at most kTilesUnderWay tiles on the wire, and within a wave younger tiles come first. What a
// message depends on, an earlier step of its tile, is in an earlier wave, with the messages of younger tiles
// between the two: they are on the wire while that step's data is combined, so the wire does not run dry.
// Consecutive steps travel on different sockets, and only messages of one socket keep that order: when the
// next message of one has to wait, those of the others go ahead, as far as tiles are loaded. (Of all messages
// that are not done, the first one waits for nothing, so something always moves.)
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
  // The messages that start on one socket of each peer.
  struct Lane {
    std::vector<Move> sends, receives;
    std::deque<Sent> leaving;                     // up to sends[num_sent]
    std::deque<Mesh::Message> arriving;           // receives[num_received ...]
    size_t num_sent = 0;                          // posted
    size_t num_received = 0;                      // taken
    std::vector<std::vector<std::byte>> inboxes;  // for what is merged
  };

  bool take_received(Lane& lane);
  bool post_receives(Lane& lane);
  bool post_sends(Lane& lane);
  size_t ring_of(const Move& move) const { return plan_.rings.mine[move.ring]; }
  int peer_of(const Move& move, int host) const {
    return plan_.rings.members[ring_of(move)][static_cast<size_t>(host)];
  }
  int lane_of(const Move& move) const;
  // Whether what `move` brought has been taken, on this rank.
  std::vector<bool>::reference received(const Move& move, size_t step) {
    const size_t chunk = move.tile * plan_.rings.mine.size() + move.ring;
    return received_[chunk * plan_.schedule.size() + step];
  }
  bool all_received(const Move& move, const std::vector<size_t>& steps);

  Mesh& mesh_;
  const HostPlan& plan_;
  ChunkAt chunk_at_;
  Merge merge_;
  // By step: the earlier ones that bring the slice which it sends, and the slice which it receives.
  std::vector<std::vector<size_t>> before_send_, before_take_;
  std::vector<Lane> lanes_;
  std::vector<bool> received_;
  std::vector<size_t> moves_left_;  // by tile
  size_t num_loaded_ = 0;
  size_t num_done_ = 0;
};

}  // namespace mlsys::comm
