#include "comm/bringup/locality.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <span>
#include <stdexcept>

#include "comm/auth/acceptor.h"
#include "comm/fault/faults.h"
#include "comm/local/control_block.h"

namespace mlsys::comm {
namespace {

using Deadline = std::chrono::steady_clock::time_point;

constexpr int kLookMs = 20;

bool could_share(const Identity& left, const Identity& right) {
  return left.boot_id == right.boot_id && left.network_space == right.network_space &&
         left.locality == right.locality;
}

// The lowest rank that `rank` could share memory with (itself when there is no lower one).
int candidate_leader(const std::vector<Identity>& identities, int rank) {
  int leader = 0;
  while (!could_share(identities[leader], identities[rank])) ++leader;
  return leader;
}

// What ends the waits of bring-up besides success.
struct Patience {
  const std::function<bool()>& stop;
  const Liveness& liveness;
  Rendezvous& rendezvous;
  Deadline deadline;

  // Throws when waiting for group rank `awaited` has become pointless; `what` ends the sentence.
  void expect_time(int awaited, const char* what) const {
    if (stop()) throw TimedOut("the group was shut down while it was still connecting.");
    if (liveness.is_dead(awaited)) throw liveness.failure_of(awaited);
    rendezvous.heed_failures();
    if (std::chrono::steady_clock::now() < deadline) return;
    rendezvous.time_out(awaited, what);
  }
};

// What a rank hands to the others of its host.
struct Offer {
  UniqueFd arena, pidfd, doorbell;
  void send(int socket) const {
    send_descriptors(socket, std::array{arena.get(), pidfd.get(), doorbell.get()});
  }
  static Offer receive(int socket, const std::function<void()>& check) {
    std::vector<UniqueFd> fds = receive_descriptors(socket, 3, check);
    return {std::move(fds[0]), std::move(fds[1]), std::move(fds[2])};
  }
};

Offer my_offer(int arena_fd) {
  Offer offer{UniqueFd(::dup(arena_fd)), UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0))),
              make_eventfd()};
  if (!offer.arena) throw_errno("dup of the arena");
  if (!offer.pidfd) throw_errno("pidfd_open");
  return offer;
}

// The lowest rank's side: members that have proved the job's key. Strangers are dropped.
class Door {
 public:
  Door(UniqueFd listening, const Credentials& credentials, Strangers& strangers)
      : acceptor_(std::move(listening), credentials, strangers) {}

  void answer() {
    for (Acceptor::Peer& peer : acceptor_.progress()) {
      if (peer.purpose == Purpose::kLocality) members_.try_emplace(peer.rank, std::move(peer.fd));
    }
  }

  std::map<int, Socket>& await(std::span<const int> ranks, const Patience& patience) {
    for (const int rank : ranks) {
      for (answer(); !members_.contains(rank); answer()) {
        patience.expect_time(rank, "connected but did not prove the job's key. All ranks need the same one.");
        std::vector<pollfd> polls;
        acceptor_.append_polls(polls);
        if (::poll(polls.data(), polls.size(), kLookMs) < 0 && errno != EINTR) throw_errno("poll");
      }
    }
    return members_;
  }

 private:
  Acceptor acceptor_;
  std::map<int, Socket> members_;
};

// The other ranks' side: a call that is tried again when a crowd of strangers has pushed it out of the
// waiting room.
class LeaderCall {
 public:
  LeaderCall(std::string socket_name, int leader, const Credentials& credentials)
      : name_(std::move(socket_name)), leader_(leader), credentials_(credentials) {
    dial();
  }

  // False when the socket cannot be reached from here: there is no sharing with that rank.
  bool reachable() const { return reachable_; }

  void progress() {
    if (!reachable_ || done_ || std::chrono::steady_clock::now() < again_at_) return;
    if (!handshake_) return dial();
    const HandshakeState state = handshake_->step();
    if (state == HandshakeState::kDone) done_ = true;
    if (state != HandshakeState::kFailed) return;
    if (num_tries_ >= kMostTries) {
      throw std::runtime_error("the local rank " + std::to_string(leader_) + " refused the connection: " +
                               handshake_->failure() + ". All ranks need the same MLSYS_JOB_KEY.");
    }
    handshake_.reset();
    again_at_ = std::chrono::steady_clock::now() + kBetweenTries;
  }

  UniqueFd await(const Patience& patience) {
    for (progress(); !done_; progress()) {
      patience.expect_time(leader_, "is the first of this host and does not answer.");
      pollfd waiting{handshake_ ? handshake_->fd() : -1, POLLIN, 0};
      const bool idle = !handshake_ || handshake_->wants_to_write();
      if (::poll(&waiting, 1, idle ? 1 : kLookMs) < 0 && errno != EINTR) throw_errno("poll");
    }
    return handshake_->take_fd();
  }

 private:
  void dial() {
    ++num_tries_;
    bool busy = false;
    UniqueFd fd = connect_unix(name_, &busy);
    reachable_ = fd || busy || num_tries_ > 1;
    if (fd) handshake_.emplace(Handshake::call(std::move(fd), credentials_, Purpose::kLocality, leader_));
    if (!fd) again_at_ = std::chrono::steady_clock::now() + kBetweenTries;
  }

  static constexpr int kMostTries = 100;
  static constexpr std::chrono::milliseconds kBetweenTries{10};
  std::string name_;
  int leader_;
  Credentials credentials_;
  std::optional<Handshake> handshake_;
  bool reachable_ = false;
  bool done_ = false;
  int num_tries_ = 0;
  Deadline again_at_{};
};

void lead(SharedHost& host, const std::vector<int>& ranks, std::map<int, Socket>& members, int world_size,
          Offer own, const Patience& patience) {
  std::vector<Offer> offers;
  offers.push_back(std::move(own));
  for (const int rank : std::span(ranks).subspan(1)) {
    offers.push_back(
        Offer::receive(members.at(rank).fd(), [&] { patience.expect_time(rank, "sent no shared memory."); }));
  }
  host.control = ControlBlock::make(static_cast<int>(ranks.size()), world_size);
  for (const int rank : std::span(ranks).subspan(1)) {
    const int socket = members.at(rank).fd();
    send_descriptors(socket, std::array{host.control.get()});
    for (const Offer& offer : offers) offer.send(socket);
  }
  for (Offer& offer : offers) {
    host.arenas.push_back(std::move(offer.arena));
    host.pidfds.push_back(std::move(offer.pidfd));
    host.doorbells.push_back(std::move(offer.doorbell));
  }
}

void follow(SharedHost& host, std::span<const int> ranks, const UniqueFd& socket, const Offer& own,
            const Patience& patience) {
  // The first rank answers when all have offered, so any of them may be who keeps us waiting.
  const auto check = [&] {
    for (const int rank : ranks) {
      patience.expect_time(rank, "is the first of this host, or one of it, and passed on no shared memory.");
    }
  };
  own.send(socket.get());
  host.control = std::move(receive_descriptors(socket.get(), 1, check)[0]);
  for (size_t local = 0; local < ranks.size(); ++local) {
    Offer offer = Offer::receive(socket.get(), check);
    host.arenas.push_back(std::move(offer.arena));
    host.pidfds.push_back(std::move(offer.pidfd));
    host.doorbells.push_back(std::move(offer.doorbell));
  }
}

}  // namespace

SharedHost prove_locality(Rendezvous& rendezvous, const Credentials& credentials, Strangers& strangers,
                          const std::vector<Identity>& identities, UniqueFd listening, int arena_fd,
                          std::function<bool()> stop, const Liveness& liveness, Deadline deadline) {
  const int rank = credentials.rank;
  const int leader = candidate_leader(identities, rank);
  const Patience patience{stop, liveness, rendezvous, deadline};
  Door door(std::move(listening), credentials, strangers);
  std::optional<LeaderCall> call;
  if (leader != rank) call.emplace(identities[static_cast<size_t>(leader)].socket_name, leader, credentials);
  const bool joined = leader == rank || call->reachable();
  rendezvous.put("joined", rank, {static_cast<uint8_t>(joined)});

  SharedHost host;
  std::map<int, size_t> host_of_leader;
  size_t mine = 0;
  try {
    for (int other = 0; other < credentials.size; ++other) {
      const std::vector<uint8_t> verdict = rendezvous.get("joined", other, true, [&] {
        door.answer();
        if (joined && call) call->progress();
      });
      const int its_leader = verdict == std::vector<uint8_t>{1} ? candidate_leader(identities, other) : other;
      const auto [entry, fresh] = host_of_leader.try_emplace(its_leader, host.hosts.size());
      if (fresh) host.hosts.emplace_back();
      host.hosts[entry->second].push_back(other);
      if (other == rank) mine = entry->second;
    }
    const std::vector<int>& ranks = host.hosts[mine];
    Offer own = my_offer(arena_fd);
    if (ranks.front() == rank) {
      std::map<int, Socket>& members = door.await(std::span(ranks).subspan(1), patience);
      lead(host, ranks, members, credentials.size, std::move(own), patience);
    } else {
      follow(host, ranks, call->await(patience), own, patience);
    }
  } catch (const PeerFailed&) {
    throw;
  } catch (const TimedOut&) {
    throw;
  } catch (const std::runtime_error& error) {
    // Told while the connections of this rank are still open: nobody takes their end for the cause.
    rendezvous.explain(error);
    throw;
  }
  return host;
}

}  // namespace mlsys::comm
