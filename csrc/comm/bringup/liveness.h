// Which ranks have died while the group connects. Before there is a watch thread, whoever waits looks here.
#pragma once

#include <chrono>
#include <map>

#include "comm/bringup/identity.h"
#include "comm/communicator.h"
#include "memory/posix.h"

namespace mlsys::comm {

// Holds a pidfd for every rank of this kernel and process namespace; others cannot be watched, and count as
// alive.
class Liveness {
 public:
  // Call for each rank as it becomes known who it is. `mine` tells which ranks can be watched.
  void add(int rank, int global_rank, const Identity& theirs, const Identity& mine);

  bool knows(int rank) const { return peers_.contains(rank); }
  bool is_dead(int rank) const;
  // Sleeps for `pause`, or until `rank` (any, when -1) is dead.
  void sleep(int rank, std::chrono::milliseconds pause) const;
  // The lowest rank that died, or -1. Waits up to `grace` for one, because a dying process closes its sockets
  // before it counts as dead.
  int first_dead(std::chrono::milliseconds grace = {}) const;

  // The lowest rank whose process is stopped, or -1.
  int first_stopped() const;

  // PeerFailed that names group rank `rank`.
  PeerFailed failure_of(int rank) const;

 private:
  struct Peer {
    int global_rank;
    std::string host;
    int64_t pid;
    UniqueFd pidfd;  // empty when the process was gone already
  };
  std::map<int, Peer> peers_;
};

}  // namespace mlsys::comm
