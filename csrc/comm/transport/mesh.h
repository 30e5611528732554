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

  Mesh(const Topology& topology, const Faults& faults, const Credentials& credentials, Strangers& strangers,
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
  // A call under way, and what to do when it breaks off: a crowd of strangers may have pushed it out of the
  // peer's waiting room, so it is tried again.
  struct Call {
    int peer;
    std::optional<Handshake> handshake;
    int num_tries = 0;
    Clock::time_point again_at{};
  };

  // Starts calling a rank of another host; throws PeerFailed when it is refused.
  void dial(Call& call, Purpose purpose) const;
  // True when connected. Throws PeerFailed when trying again is in vain.
  bool progress(Call& call, Purpose purpose, const std::function<bool(int)>& is_dead);
  using Sockets = std::unordered_map<int, Socket>;

  Sockets& sockets(Purpose purpose) { return purpose == Purpose::kControl ? control_ : data_; }
  int fd_of(int peer) const;
  void serve_acceptor();
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
