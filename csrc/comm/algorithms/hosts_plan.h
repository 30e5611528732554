// Who sends what to whom between hosts, as values: rings of ranks, and schedules of steps.
//
// A ring takes one rank of each host. The data of an operation is spread over the rings, so that every local
// rank is on the wire with a share of its own; a host with fewer ranks than there are rings puts several
// rings on a rank. Within a ring a schedule says, for each host, which slice goes where in which step.
// Nothing here depends on sizes of chunks, sockets or timing.
#pragma once

#include <cstddef>
#include <vector>

#include "comm/operation.h"
#include "comm/topology.h"

namespace mlsys::comm {

struct Rings {
  std::vector<std::vector<int>> members;  // [ring][host] -> rank
  std::vector<size_t> mine;               // those that this rank is a member of

  size_t size() const { return members.size(); }
};

// As many rings as the largest host has ranks; ring j runs through local rank j modulo the host's size.
Rings rings_of_all(const Topology& topology);
// One ring through `root` on its host and the leaders of the others; root -1: leaders everywhere.
Rings ring_of_leaders(const Topology& topology, int root);

// One step of one host. A send waits for the receives of the same slice in earlier steps, and for nothing
// else.
struct Step {
  int to = -1;  // host that gets slice `out`; -1: nobody
  size_t out = 0;
  int from = -1;  // host that slice `in` comes from; -1: none
  size_t in = 0;
  bool merge = false;  // combine what arrives with what is there; otherwise it takes its place
};
using Schedule = std::vector<Step>;

Schedule ring_all_reduce(int hosts, int me);
Schedule ring_reduce(int hosts, int me, int root);
// After it host h holds the combination of all hosts' slices h.
Schedule exchange_reduce_scatter(int hosts, int me);
// Host h starts with slice h; after it every host, or host `root` alone, has all slices.
Schedule exchange_all_gather(int hosts, int me);
Schedule exchange_gather(int hosts, int me, int root);
// Slice 0 of `root` to everyone: in the fewest steps, or in the fewest bytes a host.
Schedule tree_broadcast(int hosts, int me, int root);
Schedule chain_broadcast(int hosts, int me, int root);

struct HostPlan {
  Rings rings;
  Schedule schedule;
};

// Whether an operation takes few steps rather than few bytes. By element count (bytes for a broadcast) and
// number of hosts alone, because it decides the order of sums.
bool is_small(const Topology& topology, const Descriptor& call);
// Empty for operations whose ranks talk in pairs: see hosts_pairs.cpp.
HostPlan plan_of(const Topology& topology, const Descriptor& call);

}  // namespace mlsys::comm
