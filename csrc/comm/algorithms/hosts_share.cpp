// All-gather and broadcast over several hosts: into the host's scratch area, between the leaders, out of it.
//
// The scratch area has two halves that tiles use in turn: when a rank writes into a half again, everyone has
// passed the barrier of the tile between, and so has copied the old contents out.
#include "comm/algorithms/hosts.h"
#include "comm/algorithms/ring.h"

namespace mlsys::comm {
namespace {

constexpr size_t kHalf = ControlBlock::kScratchBytes / 2;

}  // namespace

void hosts_all_gather(Context& context, const void* input, std::span<void* const> outputs, size_t bytes) {
  const Topology& topology = context.topology;
  const auto me = static_cast<size_t>(topology.rank);
  copy_bytes(outputs[me], input, bytes);
  std::vector<std::span<std::byte>> blocks;
  if (one_rank_each(topology)) {
    for (void* output : outputs) blocks.emplace_back(static_cast<std::byte*>(output), bytes);
    return ring_all_gather(context, blocks);
  }
  std::vector<size_t> position(outputs.size());  // of each rank's tile: the ranks of a host lie together
  size_t next = 0;
  for (const std::vector<int>& host : topology.hosts) {
    for (const int rank : host) position[static_cast<size_t>(rank)] = next++;
  }
  const size_t tile = kHalf / outputs.size();
  for (size_t first = 0, k = 0; first < bytes; first += tile, ++k) {
    const size_t n = std::min(tile, bytes - first);
    std::byte* half = context.team.scratch() + (k & 1) * kHalf;
    copy_bytes(half + position[me] * n, at(input, first), n);
    context.team.barrier();
    if (topology.is_leader()) {
      blocks.clear();
      for (const std::vector<int>& host : topology.hosts) {
        blocks.emplace_back(half + position[static_cast<size_t>(host.front())] * n, host.size() * n);
      }
      ring_all_gather(context, blocks);
    }
    context.team.barrier();
    for (size_t rank = 0; rank < outputs.size(); ++rank) {
      if (rank != me) copy_bytes(at(outputs[rank], first), half + position[rank] * n, n);
    }
    context.counters.add_shm(n * static_cast<size_t>(topology.local_size() - 1));
  }
}

// Dissemination among the leaders: in step s, tell the host 2^s further on and hear from the one 2^s before.
// After ceil(log2 H) steps everyone has heard, directly or not, from everyone. Hensgen, Finkel & Manber 1988.
void hosts_barrier(Context& context) {
  const Topology& topology = context.topology;
  const int hosts = topology.num_hosts();
  for (int distance = 1; topology.is_leader() && distance < hosts; distance *= 2) {
    const std::byte token{1};
    std::byte heard{0};
    const std::array sends{Outgoing{topology.leader_of((topology.my_host() + distance) % hosts), &token, 1}};
    const std::array receives{
        Incoming{topology.leader_of((topology.my_host() + hosts - distance) % hosts), &heard, 1}};
    context.mesh->transfer(sends, receives);
  }
  context.team.barrier();
}

// The leader of the root's host sends to all other leaders.
void hosts_broadcast(Context& context, void* data, size_t bytes, int root) {
  const Topology& topology = context.topology;
  const int root_leader = topology.leader_of(topology.host_of[root]);
  const bool flat = one_rank_each(topology);
  const size_t tile = flat ? std::max<size_t>(bytes, 1) : kHalf;
  for (size_t first = 0, k = 0; first < bytes; first += tile, ++k) {
    const size_t n = std::min(tile, bytes - first);
    std::byte* buffer = flat ? at(data, first) : context.team.scratch() + (k & 1) * kHalf;
    if (!flat) {
      if (topology.rank == root) copy_bytes(buffer, at(data, first), n);
      context.team.barrier();
    }
    std::vector<Outgoing> sends;
    std::vector<Incoming> receives;
    if (topology.rank == root_leader) {
      for (int host = 0; host < topology.num_hosts(); ++host) {
        if (host != topology.my_host()) sends.push_back({topology.leader_of(host), buffer, n});
      }
    } else if (topology.is_leader()) {
      receives.push_back({root_leader, buffer, n});
    }
    if (topology.is_leader()) context.mesh->transfer(sends, receives);
    if (flat) continue;
    context.team.barrier();
    if (topology.rank == root) continue;
    copy_bytes(at(data, first), buffer, n);
    if (context.team.size() > 1) context.counters.add_shm(n);  // alone, it came through this rank's own
  }
}

}  // namespace mlsys::comm
