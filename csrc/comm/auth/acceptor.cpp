#include "comm/auth/acceptor.h"

#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>

namespace mlsys::comm {

Acceptor::Acceptor(UniqueFd listening, const Credentials& credentials, Strangers& strangers)
    : listening_(std::move(listening)),
      credentials_(credentials),
      strangers_(&strangers),
      spare_(::open("/dev/null", O_RDONLY | O_CLOEXEC)) {}

void Acceptor::append_polls(std::vector<pollfd>& polls) const {
  polls.push_back({listening_.fd(), POLLIN, 0});
  for (const Handshake& handshake : pending_) polls.push_back({handshake.fd(), POLLIN, 0});
}

std::vector<Acceptor::Peer> Acceptor::progress() {
  std::vector<Peer> peers;
  step_pending(peers);
  bool newcomers = false;
  for (size_t accepted = 0; accepted < kMostAtOnce; ++accepted) {
    bool short_of_descriptors = false;
    UniqueFd fd = accept_nonblocking(listening_.fd(), &short_of_descriptors);
    if (short_of_descriptors) refuse_one();
    if (!fd) break;
    newcomers = true;
    if (pending_.size() >= kMostPending) make_room();
    pending_.push_back(Handshake::accept(std::move(fd), credentials_));
  }
  if (newcomers) step_pending(peers);
  return peers;
}

void Acceptor::step_pending(std::vector<Peer>& peers) {
  std::vector<Handshake> still_pending;
  const auto now = std::chrono::steady_clock::now();
  for (Handshake& handshake : pending_) {
    const HandshakeState state = handshake.step();
    if (state == HandshakeState::kDone) {
      peers.push_back({handshake.take_fd(), handshake.peer(), handshake.purpose(), handshake.lane()});
    } else if (state == HandshakeState::kFailed) {
      strangers_->turn_away(handshake.failure());
    } else if (now - handshake.started() > Handshake::kPatience) {
      strangers_->turn_away("it did not prove the job's key in time");
    } else {
      still_pending.push_back(std::move(handshake));
    }
  }
  pending_ = std::move(still_pending);
}

void Acceptor::make_room() {
  auto oldest_silent = std::find_if(pending_.begin(), pending_.end(),
                                    [](const Handshake& handshake) { return !handshake.greeted(); });
  if (oldest_silent == pending_.end()) oldest_silent = pending_.begin();
  pending_.erase(oldest_silent);
  strangers_->turn_away("too many others were knocking");
}

void Acceptor::refuse_one() {
  spare_.reset();
  bool still_short = false;
  if (accept_nonblocking(listening_.fd(), &still_short))
    strangers_->turn_away("no descriptor was left for it");
  spare_ = UniqueFd(::open("/dev/null", O_RDONLY | O_CLOEXEC));
}

}  // namespace mlsys::comm
