// The TCP connections of one rank to ranks of other hosts, opened when an operation first needs them.
//
// Of two ranks the higher one calls and the lower one accepts. Everybody who waits in here also serves the
// acceptor, so that two ranks opening connections in different orders cannot block each other; every
// operation opens what it needs before it waits for anything else. All waits watch the abort descriptor of
// Faults.
#pragma once

#include <chrono>
#include <functional>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "comm/auth/acceptor.h"
#include "comm/fault/faults.h"
#include "comm/topology.h"
#include "comm/transport/socket.h"

namespace mlsys::comm {

struct Outgoing {
  int peer;
  const void* data;
  size_t bytes;
};
struct Incoming {
  int peer;
  void* data;
  size_t bytes;
};

class Mesh {
 public:
  using Clock = std::chrono::steady_clock;

  Mesh(const Topology& topology, const Faults& faults, const Credentials& credentials,
       std::vector<TcpAddress> addresses, UniqueFd listening);

  // Names the operation in errors and sets the deadline of all waits until the next begin().
  void begin(const Descriptor& op, Clock::time_point deadline);

  // Returns when there is a connection to each of `peers`. `is_dead` says what the watch thread cannot say
  // while the group connects.
  void ensure(std::span<const int> peers, Purpose purpose = Purpose::kData,
              const std::function<bool(int)>& is_dead = nullptr);
  Socket take_control(int peer);

  // Moves what can be moved now and returns the number of bytes, possibly 0.
  size_t try_send(int peer, const void* data, size_t bytes);
  size_t try_receive(int peer, void* data, size_t bytes);
  // Sleeps until a peer in `readers` has sent something or one in `writers` accepts more.
  void wait(std::span<const int> readers, std::span<const int> writers);

  // Does all of it, in the given order for each peer and concurrently between peers.
  void transfer(std::span<const Outgoing> sends, std::span<const Incoming> receives);

  void close();

  uint64_t bytes_sent() const { return bytes_sent_; }
  uint64_t bytes_received() const { return bytes_received_; }

 private:
  // Calls a rank of another host; throws PeerFailed when it is refused.
  Handshake call(int peer, Purpose purpose) const;
  using Sockets = std::unordered_map<int, Socket>;

  Sockets& sockets(Purpose purpose) { return purpose == Purpose::kControl ? control_ : data_; }
  int fd_of(int peer) const;
  void serve_acceptor();
  [[noreturn]] void time_out(std::span<const int> peers, const char* what) const;
  int poll_timeout_ms() const;

  const Topology& topology_;
  const Faults& faults_;
  Credentials credentials_;
  std::vector<TcpAddress> addresses_;
  std::optional<Acceptor> acceptor_;  // empty once closed
  Sockets data_;
  Sockets control_;
  Descriptor op_;
  Clock::time_point deadline_;
  std::atomic<uint64_t> bytes_sent_{0};
  std::atomic<uint64_t> bytes_received_{0};
};

}  // namespace mlsys::comm
