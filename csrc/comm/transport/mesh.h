// The connections of one rank to ranks of other hosts, opened when an operation first needs them, and the
// messages of the operation under way. Where the binding brought a carrier along, the data is its business,
// and the connections here are for control alone.
//
// Of two ranks the higher one calls and the lower one accepts. Everybody who waits in here also serves the
// acceptor, so that two ranks opening connections in different orders cannot block each other; every
// operation opens what it needs before it waits for anything else. All waits watch the abort descriptor of
// Faults.
//
// Messages are posted and move while this rank calls progress(), step(), transfer() or finish(). Both ends of
// a message give it the same size and the same lane. A message is cut into pieces; piece i travels on lane
// (lane + i), so that a large one uses all sockets and small ones keep their order on the lane they name.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "comm/auth/acceptor.h"
#include "comm/fault/faults.h"
#include "comm/topology.h"
#include "comm/transport/socket_carrier.h"

namespace mlsys::comm {

struct Outgoing {
  int peer;
  const void* data;
  size_t bytes;
  int lane = 0;
};
struct Incoming {
  int peer;
  void* data;
  size_t bytes;
  int lane = 0;
};

class Mesh {
 public:
  using Clock = std::chrono::steady_clock;
  using Message = uint32_t;

  static constexpr size_t kPieceBytes = 512 << 10;

  Mesh(const Topology& topology, const Faults& faults, const Credentials& credentials, Strangers& strangers,
       std::vector<TcpAddress> addresses, UniqueFd listening, int sockets_per_peer,
       std::shared_ptr<Carrier> brought);

  // Names the operation in errors and sets the deadline of all waits until the next begin().
  void begin(const Descriptor& op, Clock::time_point deadline);

  // Returns when there is a connection to each of `peers`. `is_dead` says what the watch thread cannot say
  // while the group connects.
  void ensure(std::span<const int> peers, Purpose purpose = Purpose::kData,
              const std::function<bool(int)>& is_dead = nullptr);
  Socket take_control(int peer);
  // Sends `bytes` over the control connections that nobody has taken yet, as far as they fit.
  void tell_controls(std::span<const uint8_t> bytes) const;

  // Posts the operation's descriptor to `next` and the comparison with the one from `previous`, which happens
  // as soon as it has come, at the latest in finish(): no operation waits for it longer than for its data.
  void greet(int next, int previous);

  // Messages without bytes are done at once. Memory stays valid until done() or the end of the operation.
  Message post(const Outgoing& outgoing);
  Message post(const Incoming& incoming);
  bool done(Message message) const { return remaining_[message] == 0; }
  bool all_done() const { return num_unfinished_ == 0; }
  // Moves what can be moved now; true when anything moved.
  bool progress();
  // progress(), and after several fruitless calls in a row a sleep until something can move, of at most
  // `at_most_ms`.
  bool step(int at_most_ms = kLongestSleepMs);
  // Returns when everything that was posted is done.
  void finish();

  // Posts all of it, in the given order for each peer, and returns when it is done.
  void transfer(std::span<const Outgoing> sends, std::span<const Incoming> receives);

  void close();

  int sockets_per_peer() const { return sockets_per_peer_; }
  const Carrier& carrier() const {
    if (brought_ != nullptr) return *brought_;
    return sockets_;
  }
  bool brings_carrier() const { return brought_ != nullptr; }

 private:
  static constexpr int kLongestSleepMs = 200;

  // A call under way, and what to do when it breaks off: a crowd of strangers may have pushed it out of the
  // peer's waiting room, so it is tried again.
  struct Call {
    int peer;
    int lane;
    std::optional<Handshake> handshake;
    int num_tries = 0;
    Clock::time_point again_at{};
  };

  // Starts calling a rank of another host; throws PeerFailed when it is refused.
  void dial(Call& call, Purpose purpose) const;
  // True when connected. Throws PeerFailed when trying again is in vain.
  bool progress(Call& call, Purpose purpose, const std::function<bool(int)>& is_dead);
  bool connected(int peer, Purpose purpose) const;
  void add_socket(int peer, Purpose purpose, int lane, UniqueFd fd);
  void serve_acceptor();
  template <class Post>
  Message post_pieces(Piece piece, size_t bytes, Post post);
  Carrier& carrier_in_use() { return const_cast<Carrier&>(carrier()); }
  void wait(int at_most_ms);
  void check_greeting();
  int poll_timeout_ms(int at_most_ms) const;

  const Topology& topology_;
  const Faults& faults_;
  Credentials credentials_;
  std::vector<TcpAddress> addresses_;
  std::optional<Acceptor> acceptor_;  // empty once closed
  int sockets_per_peer_;
  SocketCarrier sockets_;
  std::shared_ptr<Carrier> brought_;  // null: sockets_ it is
  std::map<int, Socket> control_;
  Descriptor op_;
  Clock::time_point deadline_;
  std::vector<uint32_t> remaining_;  // pieces of each message of this operation
  std::vector<uint32_t> completed_;  // scratch of progress()
  size_t num_unfinished_ = 0;        // messages
  int num_fruitless_ = 0;            // calls of step() in a row
  int greeter_ = -1;                 // whose descriptor is awaited, -1 when none is
  Message greeting_ = 0;
  Descriptor greeted_;
};

}  // namespace mlsys::comm
