// Gather, scatter and all-to-all over several hosts: pairs on one host go through shared memory, pairs on
// different hosts over a connection of their own. Also: who talks to whom.
#include <algorithm>

#include "comm/algorithms/hosts.h"
#include "comm/algorithms/hosts_plan.h"
#include "comm/algorithms/local.h"

namespace mlsys::comm {
namespace {

// The entries of a group-wide table that belong to this host, by local index.
template <class T>
std::vector<T> local_part(const Topology& topology, std::span<const T> table, T absent) {
  std::vector<T> part;
  for (const int rank : topology.local_ranks()) {
    part.push_back(table.empty() ? absent : table[static_cast<size_t>(rank)]);
  }
  return part;
}

}  // namespace

// In all of these, what goes to other hosts is posted first and moves while the host shares its part.
void hosts_gather(Context& context, const void* input, std::span<void* const> outputs, size_t bytes,
                  int root) {
  const Topology& topology = context.topology;
  Mesh& mesh = *context.mesh;
  if (topology.rank == root) {
    for (int rank = 0; rank < topology.size; ++rank) {
      if (!topology.is_local(rank)) mesh.post(Incoming{rank, outputs[static_cast<size_t>(rank)], bytes});
    }
  } else if (!topology.is_local(root)) {
    mesh.post(Outgoing{root, input, bytes});
  }
  // On the root's host; elsewhere nobody has an output, and the share is of nothing.
  if (topology.is_local(root)) {
    mesh.progress();
    local_share(context, input, local_part<void*>(topology, outputs, nullptr), bytes, -1);
  }
  mesh.finish();
}

void hosts_scatter(Context& context, std::span<const void* const> inputs, void* output, size_t bytes,
                   int root) {
  const Topology& topology = context.topology;
  Mesh& mesh = *context.mesh;
  if (topology.rank == root) {
    for (int rank = 0; rank < topology.size; ++rank) {
      if (!topology.is_local(rank)) mesh.post(Outgoing{rank, inputs[static_cast<size_t>(rank)], bytes});
    }
  } else if (!topology.is_local(root)) {
    mesh.post(Incoming{root, output, bytes});
  }
  if (topology.is_local(root)) {
    mesh.progress();
    const size_t num_local = topology.local_ranks().size();
    const auto root_local = static_cast<size_t>(topology.local_of[root]);
    std::vector<size_t> send_bytes(num_local, topology.rank == root ? bytes : 0);
    std::vector<size_t> receive_bytes(num_local, 0);
    std::vector<void*> outputs(num_local, nullptr);
    receive_bytes[root_local] = bytes;
    outputs[root_local] = output;
    local_exchange(context, local_part<const void*>(topology, inputs, nullptr), send_bytes, outputs,
                   receive_bytes);
  }
  mesh.finish();
}

// Each stream starts with the size of what follows, so that a disagreement is found before it does harm; the
// sender does not wait for it to be looked at. Partners come in order of distance, so that nobody is
// everyone's first.
void hosts_all_to_all(Context& context, std::span<const void* const> inputs,
                      std::span<const size_t> send_bytes, std::span<void* const> outputs,
                      std::span<const size_t> receive_bytes) {
  const Topology& topology = context.topology;
  Mesh& mesh = *context.mesh;
  std::vector<uint64_t> announced(send_bytes.begin(), send_bytes.end()), expected(inputs.size());
  struct Arriving {
    int rank;
    Mesh::Message size;
  };
  std::vector<Arriving> arriving;
  for (int distance = 1; distance < topology.size; ++distance) {
    const int to = (topology.rank + distance) % topology.size;
    const int from = (topology.rank + topology.size - distance) % topology.size;
    const auto target = static_cast<size_t>(to), source = static_cast<size_t>(from);
    if (!topology.is_local(to)) {
      mesh.post(Outgoing{to, &announced[target], sizeof(uint64_t)});
      mesh.post(Outgoing{to, inputs[target], send_bytes[target]});
    }
    if (topology.is_local(from)) continue;
    arriving.push_back({from, mesh.post(Incoming{from, &expected[source], sizeof(uint64_t)})});
  }
  mesh.progress();
  local_exchange(context, local_part<const void*>(topology, inputs, nullptr),
                 local_part<size_t>(topology, send_bytes, 0), local_part<void*>(topology, outputs, nullptr),
                 local_part<size_t>(topology, receive_bytes, 0));
  for (const Arriving& arrival : arriving) {
    const auto slot = static_cast<size_t>(arrival.rank);
    while (!mesh.done(arrival.size)) mesh.step();
    if (expected[slot] != receive_bytes[slot]) {
      context.faults.fail_mismatch(
          describe_size_mismatch(topology.global(arrival.rank), expected[slot],
                                 topology.global(topology.rank), receive_bytes[slot]),
          context.team.mine());
    }
    mesh.post(Incoming{arrival.rank, outputs[slot], receive_bytes[slot]});
  }
  mesh.finish();
}

namespace {

std::vector<int> peers_of(const HostPlan& plan) {
  std::vector<int> peers;
  for (const size_t ring : plan.rings.mine) {
    for (const Step& step : plan.schedule) {
      for (const int host : {step.to, step.from}) {
        const int peer = host < 0 ? -1 : plan.rings.members[ring][static_cast<size_t>(host)];
        if (peer >= 0 && std::find(peers.begin(), peers.end(), peer) == peers.end()) peers.push_back(peer);
      }
    }
  }
  return peers;
}

}  // namespace

std::vector<int> tcp_peers(const Topology& topology, const Descriptor& call) {
  std::vector<int> remote;
  for (int rank = 0; rank < topology.size; ++rank) {
    if (!topology.is_local(rank)) remote.push_back(rank);
  }
  switch (call.kind) {
    case OpKind::kAllToAll:
      return remote;
    case OpKind::kGather:
    case OpKind::kScatter:
      if (topology.rank == call.root) return remote;
      return topology.is_local(call.root) ? std::vector<int>{} : std::vector<int>{call.root};
    case OpKind::kAllReduceTree:
    case OpKind::kReduceScatterTree:
    case OpKind::kAllReduceBf16:
    case OpKind::kAllReduceInt8:  // between owners of slices, each with every other one: hosts_owned.cpp
      return peers_of(
          {rings_of_all(topology), exchange_all_gather(topology.num_hosts(), topology.my_host())});
    case OpKind::kConnecting:
    case OpKind::kBarrier: {
      std::vector<int> partners;
      for (int distance = 1; topology.is_leader() && distance < topology.num_hosts(); distance *= 2) {
        partners.push_back(topology.leader_of((topology.my_host() + distance) % topology.num_hosts()));
        partners.push_back(topology.leader_of((topology.my_host() + topology.num_hosts() - distance) %
                                              topology.num_hosts()));
      }
      return partners;
    }
    default:
      return peers_of(plan_of(topology, call));
  }
}

std::vector<int> ring_neighbours(const Topology& topology) {
  if (!topology.is_leader() || topology.num_hosts() == 1) return {};
  const int hosts = topology.num_hosts();
  return {topology.leader_of((topology.my_host() + 1) % hosts),
          topology.leader_of((topology.my_host() + hosts - 1) % hosts)};
}

}  // namespace mlsys::comm
