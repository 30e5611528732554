// Who is in the group and who shares a host: the result of bring-up, unchanged afterwards.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mlsys::comm {

struct Member {
  int global_rank = -1;
  std::string host;
  int64_t pid = 0;
};

// Ranks are group ranks everywhere but in messages. A host is a set of ranks that proved to share memory; its
// leader is its lowest rank; hosts are ordered by leader.
struct Topology {
  int rank = 0;
  int size = 1;
  std::vector<Member> members;
  std::vector<std::vector<int>> hosts;
  std::vector<int> host_of;   // rank -> index into hosts
  std::vector<int> local_of;  // rank -> index within its host

  int num_hosts() const { return static_cast<int>(hosts.size()); }
  int my_host() const { return host_of[rank]; }
  const std::vector<int>& local_ranks() const { return hosts[my_host()]; }
  int local_index() const { return local_of[rank]; }
  int local_size() const { return static_cast<int>(local_ranks().size()); }
  int leader_of(int host) const { return hosts[host].front(); }
  bool is_leader() const { return local_index() == 0; }
  bool is_local(int other) const { return host_of[other] == my_host(); }
  int global(int group_rank) const { return members[group_rank].global_rank; }
};

// Fills host_of and local_of from hosts.
inline void index_hosts(Topology& topology) {
  topology.host_of.assign(topology.size, 0);
  topology.local_of.assign(topology.size, 0);
  for (int host = 0; host < topology.num_hosts(); ++host) {
    for (size_t local = 0; local < topology.hosts[host].size(); ++local) {
      topology.host_of[topology.hosts[host][local]] = host;
      topology.local_of[topology.hosts[host][local]] = static_cast<int>(local);
    }
  }
}

}  // namespace mlsys::comm
