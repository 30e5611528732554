#include "comm/algorithms/hosts_plan.h"

#include <algorithm>

namespace mlsys::comm {
namespace {

// Elements that a host may send in all to stay with few steps: a few dozen KiB take less time on a wire of
// 10 Gbit/s than two more messages do.
constexpr uint64_t kFewElements = 16384;
constexpr uint64_t kFewBroadcastBytes = 64 << 10;

int modulo(int value, int hosts) { return (value % hosts + hosts) % hosts; }
size_t slice(int value, int hosts) { return static_cast<size_t>(modulo(value, hosts)); }

}  // namespace

Rings rings_of_all(const Topology& topology) {
  size_t most = 0;
  for (const std::vector<int>& host : topology.hosts) most = std::max(most, host.size());
  Rings rings;
  for (size_t ring = 0; ring < most; ++ring) {
    std::vector<int>& members = rings.members.emplace_back();
    for (const std::vector<int>& host : topology.hosts) members.push_back(host[ring % host.size()]);
    if (members[static_cast<size_t>(topology.my_host())] == topology.rank) rings.mine.push_back(ring);
  }
  return rings;
}

Rings ring_of_leaders(const Topology& topology, int root) {
  Rings rings;
  std::vector<int>& members = rings.members.emplace_back();
  for (int host = 0; host < topology.num_hosts(); ++host) members.push_back(topology.leader_of(host));
  if (root >= 0) members[static_cast<size_t>(topology.host_of[root])] = root;
  if (members[static_cast<size_t>(topology.my_host())] == topology.rank) rings.mine.push_back(0);
  return rings;
}

// Reduce-scatter, then all-gather, on a ring of hosts. In step s < H - 1, host h sends slice h - s and
// combines what arrives into slice h - s - 1; after H - 1 steps it owns the complete slice h + 1, and H - 1
// more steps of the same movement, without combining, bring every slice to every host. Each host sends
// 2 (H - 1) / H of the data, which is the least possible. Slice s is combined in ring order from host s on.
// Patarasuk & Yuan, J. Parallel Distrib. Comput. 69 (2009).
Schedule ring_all_reduce(int hosts, int me) {
  Schedule schedule;
  for (int s = 0; s < 2 * (hosts - 1); ++s) {
    schedule.push_back({modulo(me + 1, hosts), slice(me - s, hosts), modulo(me - 1, hosts),
                        slice(me - s - 1, hosts), s < hosts - 1});
  }
  return schedule;
}

// The reducing half of the ring; then each host sends the slice that it owns to the root.
Schedule ring_reduce(int hosts, int me, int root) {
  Schedule schedule = ring_all_reduce(hosts, me);
  schedule.resize(static_cast<size_t>(hosts - 1));
  for (int d = 1; d < hosts; ++d) {
    Step& step = schedule.emplace_back();
    const int sender = modulo(root + d, hosts);
    if (me == sender) {
      step.to = root;
      step.out = slice(me + 1, hosts);
    } else if (me == root) {
      step.from = sender;
      step.in = slice(sender + 1, hosts);
    }
  }
  return schedule;
}

// Every pair once, each step a rotation by one more, so that no host is the target of two at a time. Slice h
// is combined on host h in the order h, h - 1, h - 2, ...
Schedule exchange_reduce_scatter(int hosts, int me) {
  Schedule schedule;
  for (int s = 1; s < hosts; ++s) {
    schedule.push_back(
        {modulo(me + s, hosts), slice(me + s, hosts), modulo(me - s, hosts), slice(me, hosts), true});
  }
  return schedule;
}

Schedule exchange_all_gather(int hosts, int me) {
  Schedule schedule;
  for (int s = 1; s < hosts; ++s) {
    schedule.push_back(
        {modulo(me + s, hosts), slice(me, hosts), modulo(me - s, hosts), slice(me - s, hosts), false});
  }
  return schedule;
}

Schedule exchange_gather(int hosts, int me, int root) {
  Schedule schedule;
  for (int d = 1; d < hosts; ++d) {
    Step& step = schedule.emplace_back();
    const int sender = modulo(root + d, hosts);
    if (me == sender) {
      step.to = root;
      step.out = slice(me, hosts);
    } else if (me == root) {
      step.from = sender;
      step.in = slice(sender, hosts);
    }
  }
  return schedule;
}

// A binomial tree: after step s, 2^(s + 1) hosts have the slice, and each of them sends it on in step s + 1.
Schedule tree_broadcast(int hosts, int me, int root) {
  const int place = modulo(me - root, hosts);
  Schedule schedule;
  for (int reach = 1; reach < hosts; reach *= 2) {
    Step& step = schedule.emplace_back();
    if (place < reach && place + reach < hosts) step.to = modulo(me + reach, hosts);
    if (place >= reach && place < 2 * reach) step.from = modulo(me - reach, hosts);
  }
  return schedule;
}

// Each host sends to the next, chunk by chunk: every host's link carries the data once in each direction.
Schedule chain_broadcast(int hosts, int me, int root) {
  const int place = modulo(me - root, hosts);
  Schedule schedule(static_cast<size_t>(hosts - 1));
  if (place > 0) schedule[static_cast<size_t>(place - 1)].from = modulo(me - 1, hosts);
  if (place < hosts - 1) schedule[static_cast<size_t>(place)].to = modulo(me + 1, hosts);
  return schedule;
}

bool is_small(const Topology& topology, const Descriptor& call) {
  if (call.kind == OpKind::kBroadcast) return call.count <= kFewBroadcastBytes;
  return call.count * static_cast<uint64_t>(topology.num_hosts() - 1) <= kFewElements;
}

HostPlan plan_of(const Topology& topology, const Descriptor& call) {
  const int hosts = topology.num_hosts();
  const int me = topology.my_host();
  const int root = call.root < 0 ? -1 : topology.host_of[static_cast<size_t>(call.root)];
  const bool small = is_small(topology, call);
  switch (call.kind) {
    case OpKind::kAllReduce:
      if (small) return {ring_of_leaders(topology, -1), exchange_all_gather(hosts, me)};
      return {rings_of_all(topology), ring_all_reduce(hosts, me)};
    case OpKind::kReduce:
      if (small) return {ring_of_leaders(topology, -1), exchange_gather(hosts, me, root)};
      return {rings_of_all(topology), ring_reduce(hosts, me, root)};
    case OpKind::kReduceScatter:
      return {rings_of_all(topology), exchange_reduce_scatter(hosts, me)};
    case OpKind::kAllGather:
      return {rings_of_all(topology), exchange_all_gather(hosts, me)};
    case OpKind::kBroadcast:
      if (small) return {ring_of_leaders(topology, call.root), tree_broadcast(hosts, me, root)};
      return {rings_of_all(topology), chain_broadcast(hosts, me, root)};
    default:
      return {};
  }
}

}  // namespace mlsys::comm
