// Schedules between hosts, run on sets of contributors instead of data: what is sent is received by whom it
// is sent to, nothing is counted twice, and everyone ends with what the operation promises.
#include <set>

#include "check.h"
#include "comm/algorithms/hosts_plan.h"

namespace {

using namespace mlsys::comm;
using Contributors = std::multiset<int>;
// [host][slice]
using State = std::vector<std::vector<Contributors>>;

State run(const std::vector<Schedule>& schedules, State state) {
  const size_t hosts = schedules.size();
  for (size_t step = 0; step < schedules[0].size(); ++step) {
    const State before = state;
    for (size_t host = 0; host < hosts; ++host) {
      const Step& mine = schedules[host][step];
      if (mine.to >= 0) {
        const Step& theirs = schedules[static_cast<size_t>(mine.to)][step];
        CHECK_EQUAL(theirs.from, static_cast<int>(host));
        CHECK_EQUAL(theirs.in, mine.out);
      }
      if (mine.from < 0) continue;
      const auto from = static_cast<size_t>(mine.from);
      CHECK_EQUAL(schedules[from][step].to, static_cast<int>(host));
      Contributors& target = state[host][mine.in];
      if (!mine.merge) target.clear();
      target.insert(before[from][mine.in].begin(), before[from][mine.in].end());
    }
  }
  return state;
}

Contributors everyone(int hosts) {
  Contributors all;
  for (int host = 0; host < hosts; ++host) all.insert(host);
  return all;
}

// Every host contributes to every slice, or host h to slice h alone.
State contributions(int hosts, bool all_slices) {
  State state(static_cast<size_t>(hosts), std::vector<Contributors>(static_cast<size_t>(hosts)));
  for (int host = 0; host < hosts; ++host) {
    for (int slice = 0; slice < hosts; ++slice) {
      if (all_slices || slice == host) state[static_cast<size_t>(host)][static_cast<size_t>(slice)] = {host};
    }
  }
  return state;
}

template <class Make>
std::vector<Schedule> schedules_of(int hosts, Make make) {
  std::vector<Schedule> schedules;
  for (int host = 0; host < hosts; ++host) schedules.push_back(make(host));
  return schedules;
}

}  // namespace

TEST(ring_all_reduce_brings_every_contribution_to_everyone_once) {
  for (int hosts = 2; hosts < 8; ++hosts) {
    const auto schedules = schedules_of(hosts, [&](int me) { return ring_all_reduce(hosts, me); });
    for (const auto& slices : run(schedules, contributions(hosts, true))) {
      for (const Contributors& slice : slices) CHECK(slice == everyone(hosts));
    }
  }
}

TEST(ring_reduce_brings_every_contribution_to_the_root_once) {
  for (int hosts = 2; hosts < 8; ++hosts) {
    for (int root = 0; root < hosts; ++root) {
      const auto schedules = schedules_of(hosts, [&](int me) { return ring_reduce(hosts, me, root); });
      const State end = run(schedules, contributions(hosts, true));
      for (const Contributors& slice : end[static_cast<size_t>(root)]) CHECK(slice == everyone(hosts));
    }
  }
}

TEST(exchanges_between_all_pairs_scatter_and_gather) {
  for (int hosts = 2; hosts < 8; ++hosts) {
    const auto scatter = schedules_of(hosts, [&](int me) { return exchange_reduce_scatter(hosts, me); });
    const State scattered = run(scatter, contributions(hosts, true));
    const auto gather = schedules_of(hosts, [&](int me) { return exchange_all_gather(hosts, me); });
    const State gathered = run(gather, contributions(hosts, false));
    for (int host = 0; host < hosts; ++host) {
      const auto h = static_cast<size_t>(host);
      CHECK(scattered[h][h] == everyone(hosts));
      for (int slice = 0; slice < hosts; ++slice)
        CHECK(gathered[h][static_cast<size_t>(slice)] == Contributors{slice});
      const auto to_one = schedules_of(hosts, [&](int me) { return exchange_gather(hosts, me, host); });
      const State at_root = run(to_one, contributions(hosts, false));
      for (int slice = 0; slice < hosts; ++slice)
        CHECK(at_root[h][static_cast<size_t>(slice)] == Contributors{slice});
    }
  }
}

TEST(trees_and_chains_bring_the_roots_slice_to_every_host) {
  for (int hosts = 2; hosts < 12; ++hosts) {
    for (int root = 0; root < hosts; ++root) {
      State start(static_cast<size_t>(hosts), std::vector<Contributors>(1));
      start[static_cast<size_t>(root)][0] = {root};
      const auto tree = schedules_of(hosts, [&](int me) { return tree_broadcast(hosts, me, root); });
      const auto chain = schedules_of(hosts, [&](int me) { return chain_broadcast(hosts, me, root); });
      for (const auto& schedules : {tree, chain}) {
        for (const auto& slices : run(schedules, start)) CHECK(slices[0] == Contributors{root});
      }
    }
  }
}

TEST(every_rank_of_every_host_is_in_a_ring) {
  Topology topology;
  topology.size = 6;
  topology.hosts = {{0, 2, 3}, {1}, {4, 5}};
  index_hosts(topology);
  std::set<int> seen;
  for (topology.rank = 0; topology.rank < topology.size; ++topology.rank) {
    const Rings rings = rings_of_all(topology);
    CHECK_EQUAL(rings.size(), size_t{3});
    CHECK(!rings.mine.empty());
    for (const auto& members : rings.members) {
      CHECK_EQUAL(members.size(), topology.hosts.size());
      seen.insert(members.begin(), members.end());
    }
  }
  CHECK_EQUAL(seen.size(), size_t{6});
}
