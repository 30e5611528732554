#include "comm/transport/mesh.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

namespace mlsys::comm {
namespace {

// Tries before sleeping in poll(): data from a busy peer is usually a few microseconds away.
constexpr int kNumTries = 20;
// Of one call, before the peer is taken for lost.
constexpr int kMostCalls = 20;
constexpr std::chrono::milliseconds kBetweenCalls{50};

}  // namespace

Mesh::Mesh(const Topology& topology, const Faults& faults, const Credentials& credentials,
           Strangers& strangers, std::vector<TcpAddress> addresses, UniqueFd listening)
    : topology_(topology),
      faults_(faults),
      credentials_(credentials),
      addresses_(std::move(addresses)),
      acceptor_(std::in_place, std::move(listening), credentials, strangers) {}

void Mesh::begin(const Descriptor& op, Clock::time_point deadline) {
  op_ = op;
  deadline_ = deadline;
}

int Mesh::poll_timeout_ms() const {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline_ - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, 200));
}

void Mesh::ensure(std::span<const int> peers, Purpose purpose, const std::function<bool(int)>& is_dead) {
  std::vector<Call> calls;
  std::vector<int> missing;
  for (const int peer : peers) {
    // The next and the previous host may be the same one.
    if (peer == topology_.rank || sockets(purpose).contains(peer)) continue;
    if (std::find(missing.begin(), missing.end(), peer) != missing.end()) continue;
    missing.push_back(peer);
    if (peer < topology_.rank) calls.push_back({peer, std::nullopt});
  }
  for (Call& call : calls) dial(call, purpose);
  const auto have = [&](int peer) { return sockets(purpose).contains(peer); };
  while (std::erase_if(missing, have), !missing.empty()) {
    std::vector<pollfd> polls{{faults_.abort_fd(), POLLIN, 0}};
    acceptor_->append_polls(polls);
    int limit_ms = is_dead ? std::min(poll_timeout_ms(), 20) : poll_timeout_ms();
    for (const Call& call : calls) {
      if (call.handshake) {
        const bool writing = call.handshake->wants_to_write();
        polls.push_back({call.handshake->fd(), static_cast<short>(writing ? POLLOUT : POLLIN), 0});
      } else {
        limit_ms = std::min(limit_ms, 10);
      }
    }
    if (::poll(polls.data(), polls.size(), limit_ms) < 0 && errno != EINTR) throw_errno("poll");
    faults_.check();
    serve_acceptor();
    std::erase_if(calls, [&](Call& call) { return progress(call, purpose, is_dead); });
    std::erase_if(missing, have);
    for (const int peer : missing) {
      if (faults_.has_left(peer)) faults_.fail_left(peer, op_);
      if (is_dead && is_dead(peer))
        faults_.fail_dead(peer, "its process died while the group was connecting", op_);
    }
    if (!missing.empty() && Clock::now() >= deadline_) faults_.give_up(missing, op_);
  }
}

void Mesh::dial(Call& call, Purpose purpose) const {
  ++call.num_tries;
  try {
    call.handshake.emplace(Handshake::call(connect_tcp(addresses_[static_cast<size_t>(call.peer)]),
                                           credentials_, purpose, call.peer));
  } catch (const std::system_error& error) {  // refused at once: nobody listens there any more
    faults_.lost(call.peer, error.what(), op_);
  }
}

bool Mesh::progress(Call& call, Purpose purpose, const std::function<bool(int)>& is_dead) {
  if (!call.handshake) {
    if (Clock::now() >= call.again_at) dial(call, purpose);
    return false;
  }
  const HandshakeState state = call.handshake->step();
  if (state == HandshakeState::kUnderWay) return false;
  if (state == HandshakeState::kDone) {
    sockets(purpose)[call.peer] = Socket(call.handshake->take_fd());
    return true;
  }
  if (is_dead && is_dead(call.peer))
    faults_.fail_dead(call.peer, "its process died while the group was connecting", op_);
  const std::string why = call.handshake->failure();
  if (call.handshake->refused() || call.num_tries >= kMostCalls) {
    faults_.lost(call.peer,
                 "the TCP connection to it was refused (" + why + "); all ranks need the same MLSYS_JOB_KEY",
                 op_);
  }
  call.handshake.reset();
  call.again_at = Clock::now() + kBetweenCalls;
  return false;
}

Socket Mesh::take_control(int peer) {
  Socket socket = std::move(control_.at(peer));
  control_.erase(peer);
  return socket;
}

void Mesh::serve_acceptor() {
  for (Acceptor::Peer& peer : acceptor_->progress()) {
    // A second connection of a rank that is already connected can only be a confused job: the first one
    // stays.
    if (peer.purpose != Purpose::kData && peer.purpose != Purpose::kControl) continue;
    sockets(peer.purpose).try_emplace(peer.rank, Socket(std::move(peer.fd)));
  }
}

int Mesh::fd_of(int peer) const { return data_.at(peer).fd(); }

size_t Mesh::try_send(int peer, const void* data, size_t bytes) {
  if (bytes == 0) return 0;
  const ssize_t sent = ::send(fd_of(peer), data, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (sent >= 0) {
    bytes_sent_.fetch_add(static_cast<uint64_t>(sent), std::memory_order_relaxed);
    return static_cast<size_t>(sent);
  }
  if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return 0;
  faults_.lost(peer, std::string("the connection broke while sending: ") + std::strerror(errno), op_);
}

size_t Mesh::try_receive(int peer, void* data, size_t bytes) {
  if (bytes == 0) return 0;
  const ssize_t got = ::recv(fd_of(peer), data, bytes, MSG_DONTWAIT);
  if (got > 0) {
    bytes_received_.fetch_add(static_cast<uint64_t>(got), std::memory_order_relaxed);
    return static_cast<size_t>(got);
  }
  if (got == 0) faults_.lost(peer, "it closed its connection without leaving the group", op_);
  if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return 0;
  faults_.lost(peer, std::string("the connection broke while receiving: ") + std::strerror(errno), op_);
}

void Mesh::wait(std::span<const int> readers, std::span<const int> writers) {
  std::vector<pollfd> polls{{faults_.abort_fd(), POLLIN, 0}};
  for (const int peer : readers) polls.push_back({fd_of(peer), POLLIN, 0});
  for (const int peer : writers) polls.push_back({fd_of(peer), POLLOUT, 0});
  const size_t num_data = polls.size();
  acceptor_->append_polls(polls);
  if (::poll(polls.data(), polls.size(), poll_timeout_ms()) < 0 && errno != EINTR) throw_errno("poll");
  faults_.check();
  const auto acted = [](const pollfd& p) { return p.revents != 0; };
  const auto strangers = polls.begin() + static_cast<ptrdiff_t>(num_data);
  if (std::any_of(strangers, polls.end(), acted)) serve_acceptor();
  // Who knocks at the door does not put off the deadline.
  if (std::none_of(polls.begin(), strangers, acted) && Clock::now() >= deadline_)
    faults_.give_up(readers.empty() ? writers : readers, op_);
}

void Mesh::transfer(std::span<const Outgoing> sends, std::span<const Incoming> receives) {
  std::vector<Outgoing> out(sends.begin(), sends.end());
  std::vector<Incoming> in(receives.begin(), receives.end());
  std::erase_if(out, [](const Outgoing& o) { return o.bytes == 0; });
  std::erase_if(in, [](const Incoming& i) { return i.bytes == 0; });
  std::vector<int> readers, writers;
  for (int tries = 0; !out.empty() || !in.empty();) {
    bool moved = false;
    writers.clear();
    for (Outgoing& job : out) {
      // Jobs for the same peer keep their order: only the first unfinished one may move.
      if (std::find(writers.begin(), writers.end(), job.peer) != writers.end()) continue;
      const size_t sent = try_send(job.peer, job.data, job.bytes);
      job.data = static_cast<const std::byte*>(job.data) + sent;
      job.bytes -= sent;
      moved |= sent != 0;
      if (job.bytes != 0) writers.push_back(job.peer);
    }
    readers.clear();
    for (Incoming& job : in) {
      if (std::find(readers.begin(), readers.end(), job.peer) != readers.end()) continue;
      const size_t got = try_receive(job.peer, job.data, job.bytes);
      job.data = static_cast<std::byte*>(job.data) + got;
      job.bytes -= got;
      moved |= got != 0;
      if (job.bytes != 0) readers.push_back(job.peer);
    }
    std::erase_if(out, [](const Outgoing& o) { return o.bytes == 0; });
    std::erase_if(in, [](const Incoming& i) { return i.bytes == 0; });
    faults_.check();
    if (out.empty() && in.empty()) return;
    tries = moved ? 0 : tries + 1;
    if (tries > kNumTries) {
      wait(readers, writers);
      tries = 0;
    }
  }
}

void Mesh::close() {
  acceptor_.reset();
  data_.clear();
  control_.clear();
}

}  // namespace mlsys::comm
