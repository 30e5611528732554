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
    before_send_.emplace_back();
    before_take_.emplace_back();
    for (size_t before = 0; before < s; ++before) {
      if (schedule[before].from < 0) continue;
      if (schedule[before].in == schedule[s].out) before_send_[s].push_back(before);
      if (schedule[before].in == schedule[s].in) before_take_[s].push_back(before);
    }
  }
  received_.assign(num_tiles * num_rings * num_steps, false);
  moves_left_.assign(num_tiles, 0);
  lanes_.resize(static_cast<size_t>(mesh_.sockets_per_peer()));
  const size_t spacing = std::max<size_t>(1, (num_steps + kTilesUnderWay - 1) / kTilesUnderWay);
  const size_t num_waves = num_tiles == 0 ? 0 : (num_tiles - 1) * spacing + num_steps;
  for (size_t wave = 0; wave < num_waves && num_rings != 0; ++wave) {
    const size_t first = wave < num_steps ? 0 : (wave - num_steps) / spacing + 1;
    for (size_t tile = std::min(num_tiles, wave / spacing + 1); tile-- > first;) {
      const size_t step = wave - tile * spacing;
      for (size_t ring = 0; ring < num_rings; ++ring) {
        const Move move{static_cast<uint32_t>(tile), static_cast<uint16_t>(step),
                        static_cast<uint16_t>(ring)};
        Lane& lane = lanes_[static_cast<size_t>(lane_of(move))];
        if (schedule[step].to >= 0) lane.sends.push_back(move);
        if (schedule[step].from >= 0) lane.receives.push_back(move);
        moves_left_[tile] += (schedule[step].to >= 0) + (schedule[step].from >= 0);
      }
    }
  }
  for (Lane& lane : lanes_) lane.inboxes.resize(merge_ ? kReceivesAhead : 0);
}

// Both ends number the messages of a ring alike, whatever other rings they belong to.
int Wire::lane_of(const Move& move) const {
  return static_cast<int>((move.tile * plan_.schedule.size() + move.step) %
                          static_cast<size_t>(mesh_.sockets_per_peer()));
}

bool Wire::progress() {
  bool any = false;
  for (Lane& lane : lanes_) any |= take_received(lane);
  for (Lane& lane : lanes_) any |= post_sends(lane) | post_receives(lane);
  return any;
}

bool Wire::take_received(Lane& lane) {
  bool any = false;
  while (!lane.arriving.empty() && mesh_.done(lane.arriving.front())) {
    const Move& move = lane.receives[lane.num_received];
    if (move.tile >= num_loaded_) break;                      // there is nothing yet to merge it with
    if (!all_received(move, before_take_[move.step])) break;  // sums have one order
    const Step& step = plan_.schedule[move.step];
    if (step.merge) {
      merge_(lane.inboxes[lane.num_received % kReceivesAhead].data(),
             chunk_at_(ring_of(move), move.tile, step.in));
    }
    received(move, move.step) = true;
    --moves_left_[move.tile];
    lane.arriving.pop_front();
    ++lane.num_received;
    any = true;
  }
  return any;
}

bool Wire::post_receives(Lane& lane) {
  bool any = false;
  while (lane.arriving.size() < kReceivesAhead) {
    const size_t index = lane.num_received + lane.arriving.size();
    if (index == lane.receives.size()) break;
    const Move& move = lane.receives[index];
    const Step& step = plan_.schedule[move.step];
    // What is not merged lands in its chunk, whose slot is free once the tile is loaded.
    if (!step.merge && move.tile >= num_loaded_) break;
    Chunk chunk = chunk_at_(ring_of(move), move.tile, step.in);
    if (step.merge) {
      std::vector<std::byte>& inbox = lane.inboxes[index % kReceivesAhead];
      if (inbox.size() < chunk.bytes) inbox.resize(chunk.bytes);
      chunk.data = inbox.data();
    }
    lane.arriving.push_back(
        mesh_.post(Incoming{peer_of(move, step.from), chunk.data, chunk.bytes, lane_of(move)}));
    any = true;
  }
  return any;
}

bool Wire::all_received(const Move& move, const std::vector<size_t>& steps) {
  return std::all_of(steps.begin(), steps.end(), [&](size_t step) { return received(move, step); });
}

bool Wire::post_sends(Lane& lane) {
  bool any = false;
  for (; lane.num_sent < lane.sends.size(); ++lane.num_sent) {
    const Move& move = lane.sends[lane.num_sent];
    if (move.tile >= num_loaded_ || !all_received(move, before_send_[move.step])) break;
    const Step& step = plan_.schedule[move.step];
    const Chunk chunk = chunk_at_(ring_of(move), move.tile, step.out);
    lane.leaving.push_back(
        {mesh_.post(Outgoing{peer_of(move, step.to), chunk.data, chunk.bytes, lane_of(move)}), move.tile});
    any = true;
  }
  while (!lane.leaving.empty() && mesh_.done(lane.leaving.front().message)) {
    --moves_left_[lane.leaving.front().tile];
    lane.leaving.pop_front();
    any = true;
  }
  return any;
}

size_t Wire::num_done() {
  while (num_done_ < num_loaded_ && moves_left_[num_done_] == 0) ++num_done_;
  return num_done_;
}

}  // namespace mlsys::comm
