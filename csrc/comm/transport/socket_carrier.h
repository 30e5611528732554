// Pieces over TCP: a few sockets ("lanes") for each peer, each a queue in both directions.
#pragma once

#include <atomic>
#include <deque>
#include <map>

#include "comm/transport/carrier.h"
#include "comm/transport/socket.h"

namespace mlsys::comm {

class SocketCarrier final : public Carrier {
 public:
  explicit SocketCarrier(int num_lanes) : num_lanes_(num_lanes) {}

  // False when that lane has a socket already, which stays.
  bool attach(int peer, int lane, Socket socket);
  bool has_lane(int peer, int lane) const;
  bool connected(int peer) const;

  void post_send(const Piece& piece) override;
  void post_receive(const Piece& piece) override;
  bool progress(std::vector<uint32_t>& completed) override;
  void append_polls(std::vector<pollfd>& polls) const override;
  int longest_sleep_ms() const override { return 200; }
  std::vector<int> awaited() const override;
  void abandon(int peer, bool incoming) override;
  void close() override { peers_.clear(); }

  const char* name() const override { return "TCP"; }
  uint64_t bytes_sent() const override { return bytes_sent_.load(std::memory_order_relaxed); }
  uint64_t bytes_received() const override { return bytes_received_.load(std::memory_order_relaxed); }

 private:
  struct Lane {
    Socket socket;
    std::deque<Piece> out, in;
  };
  struct Peer {
    std::vector<Lane> lanes;
    int num_attached = 0;
  };

  Lane& lane_of(const Piece& piece) {
    return peers_.at(piece.peer).lanes[static_cast<size_t>(piece.lane % num_lanes_)];
  }
  // Bytes that went out of, or came into, the first piece of the queue.
  size_t send_some(Lane& lane, std::vector<uint32_t>& completed);
  size_t receive_some(Lane& lane, std::vector<uint32_t>& completed);

  int num_lanes_;
  std::map<int, Peer> peers_;
  std::atomic<uint64_t> bytes_sent_{0};
  std::atomic<uint64_t> bytes_received_{0};
};

}  // namespace mlsys::comm
