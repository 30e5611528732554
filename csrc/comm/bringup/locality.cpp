#include "comm/bringup/locality.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <map>

#include "comm/auth/acceptor.h"
#include "comm/fault/faults.h"
#include "comm/local/control_block.h"

namespace mlsys::comm {
namespace {

using Deadline = std::chrono::steady_clock::time_point;

constexpr std::chrono::milliseconds kGrace{300};

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
  Deadline deadline;
};

void expect_time(const Patience& patience, std::span<const int> awaited, const char* what) {
  if (patience.stop()) throw TimedOut("the group was shut down while it was still connecting.");
  for (const int rank : awaited) {
    if (patience.liveness.is_dead(rank)) throw patience.liveness.failure_of(rank);
  }
  if (std::chrono::steady_clock::now() >= patience.deadline) {
    throw TimedOut(std::string("timed out while connecting the group: ") + what);
  }
}

// What a rank hands to the others of its host.
struct Offer {
  UniqueFd arena, pidfd, doorbell;
  void send(int socket) const {
    send_descriptors(socket, std::array{arena.get(), pidfd.get(), doorbell.get()});
  }
  static Offer receive(int socket) {
    std::vector<UniqueFd> fds = receive_descriptors(socket, 3);
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

// Accepts all of `awaited`; strangers are dropped by the acceptor.
std::map<int, Socket> accept_members(UniqueFd listening, const Credentials& credentials,
                                     std::vector<int> awaited, const Patience& patience) {
  Acceptor acceptor(std::move(listening), credentials);
  std::map<int, Socket> members;
  while (!awaited.empty()) {
    expect_time(patience, awaited, "a local rank connected but did not prove the job's key.");
    std::vector<pollfd> polls;
    acceptor.append_polls(polls);
    if (::poll(polls.data(), polls.size(), 100) < 0 && errno != EINTR) throw_errno("poll");
    for (Acceptor::Peer& peer : acceptor.progress()) {
      if (peer.purpose != Purpose::kLocality || std::erase(awaited, peer.rank) == 0) continue;
      members.emplace(peer.rank, std::move(peer.fd));
    }
  }
  return members;
}

void lead(SharedHost& host, const std::vector<int>& ranks, UniqueFd listening, const Credentials& credentials,
          Offer own, const Patience& patience) {
  std::map<int, Socket> members = accept_members(std::move(listening), credentials,
                                                 std::vector<int>(ranks.begin() + 1, ranks.end()), patience);
  std::vector<Offer> offers;
  offers.push_back(std::move(own));
  for (size_t local = 1; local < ranks.size(); ++local) {
    offers.push_back(Offer::receive(members.at(ranks[local]).fd()));
  }
  host.control = ControlBlock::make(static_cast<int>(ranks.size()), credentials.size);
  for (const auto& [rank, socket] : members) {
    send_descriptors(socket.fd(), std::array{host.control.get()});
    for (const Offer& offer : offers) offer.send(socket.fd());
  }
  for (Offer& offer : offers) {
    host.arenas.push_back(std::move(offer.arena));
    host.pidfds.push_back(std::move(offer.pidfd));
    host.doorbells.push_back(std::move(offer.doorbell));
  }
}

void follow(SharedHost& host, size_t num_local, int leader, UniqueFd connection,
            const Credentials& credentials, const Offer& own, const Patience& patience) {
  Handshake handshake = Handshake::call(std::move(connection), credentials, Purpose::kLocality, leader);
  for (;;) {
    const HandshakeState state = handshake.step();
    if (state == HandshakeState::kDone) break;
    if (state == HandshakeState::kFailed) {
      throw std::runtime_error("the local rank " + std::to_string(leader) + " refused the connection: " +
                               handshake.failure() + ". All ranks need the same MLSYS_JOB_KEY.");
    }
    expect_time(patience, std::array{leader}, "the first rank of this host does not answer.");
    pollfd waiting{handshake.fd(), static_cast<short>(handshake.wants_to_write() ? POLLOUT : POLLIN), 0};
    if (::poll(&waiting, 1, 100) < 0 && errno != EINTR) throw_errno("poll");
  }
  const UniqueFd socket = handshake.take_fd();
  own.send(socket.get());
  host.control = std::move(receive_descriptors(socket.get(), 1)[0]);
  for (size_t local = 0; local < num_local; ++local) {
    Offer offer = Offer::receive(socket.get());
    host.arenas.push_back(std::move(offer.arena));
    host.pidfds.push_back(std::move(offer.pidfd));
    host.doorbells.push_back(std::move(offer.doorbell));
  }
}

}  // namespace

SharedHost prove_locality(Rendezvous& rendezvous, const Credentials& credentials,
                          const std::vector<Identity>& identities, UniqueFd listening, int arena_fd,
                          std::function<bool()> stop, const Liveness& liveness, Deadline deadline) {
  const int rank = credentials.rank;
  const int leader = candidate_leader(identities, rank);
  UniqueFd connection;
  if (leader != rank) connection = connect_unix(identities[leader].socket_name);
  const bool joined = leader == rank || connection;
  rendezvous.put("joined", rank, {static_cast<uint8_t>(joined)});

  SharedHost host;
  std::map<int, size_t> host_of_leader;
  size_t mine = 0;
  for (int other = 0; other < credentials.size; ++other) {
    const std::vector<uint8_t> verdict = rendezvous.get("joined", other, true);
    const int its_leader = verdict == std::vector<uint8_t>{1} ? candidate_leader(identities, other) : other;
    const auto [entry, fresh] = host_of_leader.try_emplace(its_leader, host.hosts.size());
    if (fresh) host.hosts.emplace_back();
    host.hosts[entry->second].push_back(other);
    if (other == rank) mine = entry->second;
  }
  const std::vector<int>& ranks = host.hosts[mine];
  Offer own = my_offer(arena_fd);
  const Patience patience{stop, liveness, deadline};
  try {
    if (ranks.front() == rank) {
      lead(host, ranks, std::move(listening), credentials, std::move(own), patience);
    } else {
      follow(host, ranks.size(), ranks.front(), std::move(connection), credentials, own, patience);
    }
  } catch (const PeerFailed&) {
    throw;
  } catch (const std::runtime_error&) {
    // A connection that ends early is most often a death, here or further on; that is what should be named.
    if (const int dead = liveness.first_dead(kGrace); dead >= 0) throw liveness.failure_of(dead);
    throw;
  }
  return host;
}

}  // namespace mlsys::comm
