// A listening socket that hands out only peers that proved the job's key.
//
// Strangers, half-open and slow connections wait among the pending ones until they fail or their time is up;
// at most kMostPending at once, the oldest making room. They never delay a peer that does answer.
#pragma once

#include <poll.h>

#include <functional>
#include <vector>

#include "comm/auth/handshake.h"
#include "comm/transport/socket.h"

namespace mlsys::comm {

class Acceptor {
 public:
  static constexpr size_t kMostPending = 64;
  struct Peer {
    UniqueFd fd;
    int rank = -1;
    Purpose purpose = Purpose::kData;
  };

  Acceptor(UniqueFd listening, const Credentials& credentials);

  // Adds what to wait for.
  void append_polls(std::vector<pollfd>& polls) const;
  // Accepts and steps what is possible now, without blocking; returns the peers that have proved themselves.
  std::vector<Peer> progress();
  uint64_t num_dropped() const { return num_dropped_; }

 private:
  Socket listening_;
  Credentials credentials_;
  std::vector<Handshake> pending_;
  uint64_t num_dropped_ = 0;
};

}  // namespace mlsys::comm
