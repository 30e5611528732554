// What a rank tells the others about itself through the store before they are connected.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace mlsys::comm {

struct Identity {
  std::string host;            // for messages
  std::string boot_id;         // of the kernel: ranks of different kernels cannot share memory
  std::string network_space;   // abstract unix sockets are seen within one network namespace only
  std::string socket_name;     // abstract unix socket for proving locality
  std::string message_socket;  // abstract unix socket for point-to-point messages
  std::string process_space;   // pids mean the same within one process namespace only
  int64_t pid = 0;
  int32_t locality = -1;  // Options::locality of this rank
  std::string failure;    // not empty: this rank failed before it could connect, and why
};

Identity identify(int locality);

std::vector<uint8_t> encode(const Identity& identity);
// Nothing when the bytes are not an Identity.
std::optional<Identity> decode_identity(std::span<const uint8_t> bytes);

class Liveness;

// The store with this group's key prefix, waiting in short slices so that other users of the same store get
// their turn `stop` is heeded and deaths are noticed.
class Rendezvous {
 public:
  Rendezvous(std::shared_ptr<Store> store, std::string prefix, std::chrono::milliseconds timeout,
             std::function<bool()> stop, const Liveness& liveness);
  void put(const std::string& kind, int rank, const std::vector<uint8_t>& value);
  // Throws PeerFailed when the key is missing and `rank` is dead; or, when `needs_all`, any watched rank is:
  // `needs_all` says that no rank can leave this stage before all have published their key of this kind.
  std::vector<uint8_t> get(const std::string& kind, int rank, bool needs_all);

 private:
  std::shared_ptr<Store> store_;
  std::string prefix_;
  std::chrono::steady_clock::time_point deadline_;
  std::function<bool()> stop_;
  const Liveness& liveness_;
};

}  // namespace mlsys::comm
