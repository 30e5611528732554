#include "comm/algorithms/hosts_wire.h"

namespace mlsys::comm {
namespace {

constexpr size_t kReceivesAhead = 4;

}  // namespace

Wire::Wire(Context& context, const HostPlan& plan, size_t num_tiles, ChunkAt chunk_at, Merge merge)
    : mesh_(*context.mesh), plan_(plan), chunk_at_(std::move(chunk_at)), merge_(std::move(merge)) {
  const Schedule& schedule = plan.schedule;
  const size_t num_steps = schedule.size();
  const size_t num_rings = plan.rings.mine.size();
  for (size_t s = 0; s < num_steps; ++s) {
    size_t& needed = needs_.emplace_back(0);
    for (size_t before = 0; before < s; ++before) {
      if (schedule[before].from >= 0 && schedule[before].in == schedule[s].out) needed = before + 1;
    }
  }
  steps_received_.assign(num_tiles * num_rings, 0);
  moves_left_.assign(num_tiles, 0);
  const size_t spacing = std::max<size_t>(1, (num_steps + kTilesUnderWay - 1) / kTilesUnderWay);
  const size_t num_waves = num_tiles == 0 ? 0 : (num_tiles - 1) * spacing + num_steps;
  for (size_t wave = 0; wave < num_waves && num_rings != 0; ++wave) {
    const size_t first = wave < num_steps ? 0 : (wave - num_steps) / spacing + 1;
    for (size_t tile = first; tile < num_tiles && tile * spacing <= wave; ++tile) {
      const size_t step = wave - tile * spacing;
      for (size_t ring = 0; ring < num_rings; ++ring) {
        const Move move{static_cast<uint32_t>(tile), static_cast<uint16_t>(step),
                        static_cast<uint16_t>(ring)};
        if (schedule[step].to >= 0) sends_.push_back(move);
        if (schedule[step].from >= 0) receives_.push_back(move);
        moves_left_[tile] += (schedule[step].to >= 0) + (schedule[step].from >= 0);
      }
    }
  }
  inboxes_.resize(merge_ ? kReceivesAhead : 0);
}

// Both ends number the messages of a ring alike, whatever other rings they belong to.
int Wire::lane_of(const Move& move) const {
  return static_cast<int>((move.tile * plan_.schedule.size() + move.step) %
                          static_cast<size_t>(mesh_.sockets_per_peer()));
}

bool Wire::progress() {
  const bool taken = take_received();
  const bool sent = post_sends();
  const bool posted = post_receives();
  return taken || sent || posted;
}

bool Wire::take_received() {
  bool any = false;
  while (!arriving_.empty() && mesh_.done(arriving_.front())) {
    const Move& move = receives_[num_received_];
    if (move.tile >= num_loaded_) break;  // there is nothing yet to merge it with
    const Step& step = plan_.schedule[move.step];
    if (step.merge) {
      merge_(inboxes_[num_received_ % kReceivesAhead].data(), chunk_at_(ring_of(move), move.tile, step.in));
    }
    steps_received(move) = move.step + size_t{1};
    --moves_left_[move.tile];
    arriving_.pop_front();
    ++num_received_;
    any = true;
  }
  return any;
}

bool Wire::post_receives() {
  bool any = false;
  while (arriving_.size() < kReceivesAhead) {
    const size_t index = num_received_ + arriving_.size();
    if (index == receives_.size()) break;
    const Move& move = receives_[index];
    const Step& step = plan_.schedule[move.step];
    // What is not merged lands in its chunk, whose slot is free once the tile is loaded.
    if (!step.merge && move.tile >= num_loaded_) break;
    Chunk chunk = chunk_at_(ring_of(move), move.tile, step.in);
    if (step.merge) {
      std::vector<std::byte>& inbox = inboxes_[index % kReceivesAhead];
      if (inbox.size() < chunk.bytes) inbox.resize(chunk.bytes);
      chunk.data = inbox.data();
    }
    arriving_.push_back(
        mesh_.post(Incoming{peer_of(move, step.from), chunk.data, chunk.bytes, lane_of(move)}));
    any = true;
  }
  return any;
}

bool Wire::may_send(const Move& move) const {
  const size_t received = steps_received_[move.tile * plan_.rings.mine.size() + move.ring];
  return move.tile < num_loaded_ && received >= needs_[move.step];
}

bool Wire::post_sends() {
  bool any = false;
  for (; num_sent_ < sends_.size() && may_send(sends_[num_sent_]); ++num_sent_) {
    const Move& move = sends_[num_sent_];
    const Step& step = plan_.schedule[move.step];
    const Chunk chunk = chunk_at_(ring_of(move), move.tile, step.out);
    leaving_.push_back(
        {mesh_.post(Outgoing{peer_of(move, step.to), chunk.data, chunk.bytes, lane_of(move)}), move.tile});
    any = true;
  }
  while (!leaving_.empty() && mesh_.done(leaving_.front().message)) {
    --moves_left_[leaving_.front().tile];
    leaving_.pop_front();
    any = true;
  }
  return any;
}

size_t Wire::num_done() {
  while (num_done_ < num_loaded_ && moves_left_[num_done_] == 0) ++num_done_;
  return num_done_;
}

}  // namespace mlsys::comm
