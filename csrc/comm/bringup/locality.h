// Proving which ranks share memory, by really passing it.
#pragma once

#include <vector>

#include "comm/auth/handshake.h"
#include "comm/auth/strangers.h"
#include "comm/bringup/identity.h"
#include "comm/bringup/liveness.h"
#include "comm/bringup/rendezvous.h"
#include "memory/posix.h"

namespace mlsys::comm {

// What each rank of a host holds of every other one, by local index.
struct SharedHost {
  std::vector<std::vector<int>> hosts;  // of the whole group: ranks of each, ordered by first rank
  UniqueFd control;                     // memfd of the host's control block
  std::vector<UniqueFd> arenas;
  std::vector<UniqueFd> pidfds;
  std::vector<UniqueFd> doorbells;
};

// Ranks whose identities could share memory (same kernel, network namespace and locality) try it: all connect
// to the lowest of them over its abstract unix socket, prove the job's key, and exchange descriptors through
// it. A rank that cannot connect becomes a host of its own. Each rank publishes its verdict, so all agree on
// the hosts. The lowest rank answers its door all the while, so that strangers cannot block it.
SharedHost prove_locality(Rendezvous& rendezvous, const Credentials& credentials, Strangers& strangers,
                          const std::vector<Identity>& identities, UniqueFd listening, int arena_fd,
                          std::function<bool()> stop, const Liveness& liveness,
                          std::chrono::steady_clock::time_point deadline);

}  // namespace mlsys::comm
