// A listening socket that hands out only peers that proved the job's key.
//
// Strangers, half-open and slow connections wait among the pending ones until they fail or their time is up:
// Handshake::kPatience, or less when more knock. At most kMostPending wait at once; the one that has said
// nothing for the longest makes room. What has already arrived is always read before newcomers are let in,
// and only so many of these at a time, so that neither a peer that answers nor the caller's own work is kept
// waiting by a crowd.
#pragma once

#include <poll.h>

#include <vector>

#include "comm/auth/handshake.h"
#include "comm/auth/strangers.h"
#include "comm/transport/socket.h"

namespace mlsys::comm {

class Acceptor {
 public:
  static constexpr size_t kMostPending = 64;
  static constexpr size_t kMostAtOnce = 16;  // accepted in one call of progress()
  struct Peer {
    UniqueFd fd;
    int rank = -1;
    Purpose purpose = Purpose::kData;
    int lane = 0;
  };

  // `strangers` must outlive the acceptor.
  Acceptor(UniqueFd listening, const Credentials& credentials, Strangers& strangers);

  // Adds what to wait for.
  void append_polls(std::vector<pollfd>& polls) const;
  // Accepts and steps what is possible now, without blocking; returns the peers that have proved themselves.
  std::vector<Peer> progress();

 private:
  void step_pending(std::vector<Peer>& peers);
  void make_room();
  // Hangs up on one caller when this process has no descriptors left: it would wait at the door for ever, and
  // the door would look ready again and again.
  void refuse_one();

  Socket listening_;
  Credentials credentials_;
  Strangers* strangers_;
  std::vector<Handshake> pending_;  // in order of arrival
  UniqueFd spare_;                  // given up for a moment by refuse_one()
};

}  // namespace mlsys::comm
