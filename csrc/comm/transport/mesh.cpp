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

}  // namespace

Mesh::Mesh(const Topology& topology, const Faults& faults, const Credentials& credentials,
           std::vector<TcpAddress> addresses, UniqueFd listening)
    : topology_(topology),
      faults_(faults),
      credentials_(credentials),
      addresses_(std::move(addresses)),
      acceptor_(std::in_place, std::move(listening), credentials) {}

void Mesh::begin(const Descriptor& op, Clock::time_point deadline) {
  op_ = op;
  deadline_ = deadline;
}

int Mesh::poll_timeout_ms() const {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline_ - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, 200));
}

void Mesh::ensure(std::span<const int> peers, Purpose purpose, const std::function<bool(int)>& is_dead) {
  std::vector<Handshake> calls;
  std::vector<int> missing;
  for (const int peer : peers) {
    // The next and the previous host may be the same one.
    if (peer == topology_.rank || sockets(purpose).contains(peer)) continue;
    if (std::find(missing.begin(), missing.end(), peer) != missing.end()) continue;
    missing.push_back(peer);
    if (peer < topology_.rank) calls.push_back(call(peer, purpose));
  }
  const auto have = [&](int peer) { return sockets(purpose).contains(peer); };
  while (std::erase_if(missing, have), !missing.empty()) {
    std::vector<pollfd> polls{{faults_.abort_fd(), POLLIN, 0}};
    acceptor_->append_polls(polls);
    for (const Handshake& call : calls) {
      polls.push_back({call.fd(), static_cast<short>(call.wants_to_write() ? POLLOUT : POLLIN), 0});
    }
    if (::poll(polls.data(), polls.size(), poll_timeout_ms()) < 0 && errno != EINTR) throw_errno("poll");
    faults_.check();
    serve_acceptor();
    for (auto call = calls.begin(); call != calls.end();) {
      const HandshakeState state = call->step();
      if (state == HandshakeState::kFailed) {
        faults_.lost(call->peer(), "the TCP connection to it was refused (" + call->failure() + ")", op_);
      }
      if (state == HandshakeState::kDone) {
        sockets(purpose)[call->peer()] = Socket(call->take_fd());
        call = calls.erase(call);
      } else {
        ++call;
      }
    }
    std::erase_if(missing, have);
    for (const int peer : missing) {
      if (faults_.has_left(peer)) faults_.fail_left(peer, op_);
      if (is_dead && is_dead(peer))
        faults_.lost(peer, "its process died while the group was connecting", op_);
    }
    if (!missing.empty() && Clock::now() >= deadline_) time_out(missing, "a connection with");
  }
}

Handshake Mesh::call(int peer, Purpose purpose) const {
  UniqueFd fd;
  try {
    fd = connect_tcp(addresses_[static_cast<size_t>(peer)]);
  } catch (const std::system_error& error) {  // refused at once: nobody listens there any more
    faults_.lost(peer, error.what(), op_);
  }
  return Handshake::call(std::move(fd), credentials_, purpose, peer);
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
  const int ready = ::poll(polls.data(), polls.size(), poll_timeout_ms());
  if (ready < 0 && errno != EINTR) throw_errno("poll");
  faults_.check();
  const auto acted = [](const pollfd& p) { return p.revents != 0; };
  if (std::any_of(polls.begin() + static_cast<ptrdiff_t>(num_data), polls.end(), acted)) serve_acceptor();
  if (ready <= 0 && Clock::now() >= deadline_)
    time_out(readers.empty() ? writers : readers, "data from or to");
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

void Mesh::time_out(std::span<const int> peers, const char* what) const {
  std::string names;
  for (const int peer : peers) names += (names.empty() ? "" : ", ") + std::to_string(topology_.global(peer));
  throw TimedOut("rank " + std::to_string(topology_.global(topology_.rank)) + " timed out in " +
                 describe(op_) + " waiting for " + what + " rank(s) " + names + " over TCP.");
}

}  // namespace mlsys::comm
