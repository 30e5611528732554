#include "comm/auth/acceptor.h"

#include <sys/socket.h>

namespace mlsys::comm {

Acceptor::Acceptor(UniqueFd listening, const Credentials& credentials)
    : listening_(std::move(listening)), credentials_(credentials) {}

void Acceptor::append_polls(std::vector<pollfd>& polls) const {
  polls.push_back({listening_.fd(), POLLIN, 0});
  for (const Handshake& handshake : pending_) polls.push_back({handshake.fd(), POLLIN, 0});
}

std::vector<Acceptor::Peer> Acceptor::progress() {
  for (;;) {
    UniqueFd fd = accept_nonblocking(listening_.fd());
    if (!fd) break;
    if (pending_.size() >= kMostPending) {
      pending_.erase(pending_.begin());
      ++num_dropped_;
    }
    pending_.push_back(Handshake::accept(std::move(fd), credentials_));
  }
  std::vector<Peer> peers;
  std::vector<Handshake> still_pending;
  const auto now = std::chrono::steady_clock::now();
  for (Handshake& handshake : pending_) {
    const HandshakeState state = handshake.step();
    if (state == HandshakeState::kDone) {
      peers.push_back({handshake.take_fd(), handshake.peer(), handshake.purpose()});
    } else if (state == HandshakeState::kFailed || now - handshake.started() > Handshake::kPatience) {
      ++num_dropped_;
    } else {
      still_pending.push_back(std::move(handshake));
    }
  }
  pending_ = std::move(still_pending);
  return peers;
}

}  // namespace mlsys::comm
