// Everything that connects one rank to the others, built by bring-up.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/auth/handshake.h"
#include "comm/auth/strangers.h"
#include "comm/bringup/identity.h"
#include "comm/fault/faults.h"
#include "comm/fault/watch.h"
#include "comm/local/control_block.h"
#include "comm/local/local_team.h"
#include "comm/topology.h"
#include "comm/transport/mesh.h"
#include "memory/arena.h"

namespace mlsys::comm {

// Where point-to-point messages reach a rank: by unix socket from its own host, by TCP from others.
struct MessageEndpoint {
  std::string unix_name;
  TcpAddress tcp;
};

// Members are destroyed in reverse order: the watch thread first, the shared memory last.
struct Links {
  explicit Links(Strangers::Report report) : strangers(std::move(report)) {}

  Topology topology;
  Credentials credentials;
  Strangers strangers;
  std::shared_ptr<Arena> arena;
  std::vector<Mapping> peer_arenas;  // by local index; empty for this rank
  std::unique_ptr<ControlBlock> block;
  std::unique_ptr<Faults> faults;
  std::unique_ptr<LocalTeam> team;
  std::unique_ptr<Mesh> mesh;  // null when all ranks share this host
  std::vector<MessageEndpoint> message_endpoints;
  std::vector<bool>
      readable;  // by rank: its process may let this one read its memory (man 2 process_vm_readv)
  UniqueFd message_unix_listener;
  UniqueFd message_tcp_listener;  // empty when all ranks share this host
  std::unique_ptr<Watch> watch;
};

// Meets the other ranks through the store, proves which of them share memory, opens the listeners and the
// control connections, and starts the watch thread. Throws PeerFailed when a rank has died or has published
// that it failed, TimedOut, or the Store's errors; all ranks name the failure that was published first.
// `stop` ends the waiting early. `on_message` is called on the watch thread when the first sender of messages
// calls, `on_failure` when the group has failed.
std::unique_ptr<Links> connect(std::shared_ptr<Store> store, const Options& options,
                               std::function<bool()> stop, std::function<void()> on_message,
                               std::function<void()> on_failure);

// Says in the store that this rank failed before it connected, so that the others do not wait for it.
void publish_failure(Store& store, const Options& options, const std::string& cause);

}  // namespace mlsys::comm
