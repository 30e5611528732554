#include "comm/transport/socket_carrier.h"

#include <sys/socket.h>

#include <cerrno>
#include <cstring>

namespace mlsys::comm {
namespace {

bool try_again(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

// Takes `moved` bytes off the first piece and reports it when that was its end.
void advance(std::deque<Piece>& queue, size_t moved, std::vector<uint32_t>& completed) {
  Piece& piece = queue.front();
  piece.data += moved;
  piece.bytes -= moved;
  if (piece.bytes != 0) return;
  completed.push_back(piece.message);
  queue.pop_front();
}

}  // namespace

bool SocketCarrier::attach(int peer, int lane, Socket socket) {
  if (lane < 0 || lane >= num_lanes_ || has_lane(peer, lane)) return false;
  Peer& entry = peers_[peer];
  entry.lanes.resize(static_cast<size_t>(num_lanes_));
  entry.lanes[static_cast<size_t>(lane)].socket = std::move(socket);
  ++entry.num_attached;
  return true;
}

bool SocketCarrier::has_lane(int peer, int lane) const {
  const auto entry = peers_.find(peer);
  return entry != peers_.end() && static_cast<bool>(entry->second.lanes[static_cast<size_t>(lane)].socket);
}

bool SocketCarrier::connected(int peer) const {
  const auto entry = peers_.find(peer);
  return entry != peers_.end() && entry->second.num_attached == num_lanes_;
}

void SocketCarrier::post_send(const Piece& piece) { lane_of(piece).out.push_back(piece); }
void SocketCarrier::post_receive(const Piece& piece) { lane_of(piece).in.push_back(piece); }

// One call of the kernel a queue and round, so that no peer keeps the others waiting.
bool SocketCarrier::progress(std::vector<uint32_t>& completed) {
  size_t moved = 0;
  for (auto& [rank, peer] : peers_) {
    for (Lane& lane : peer.lanes) {
      if (!lane.out.empty()) moved += send_some(lane, completed);
      if (!lane.in.empty()) moved += receive_some(lane, completed);
    }
  }
  return moved != 0;
}

size_t SocketCarrier::send_some(Lane& lane, std::vector<uint32_t>& completed) {
  const Piece& piece = lane.out.front();
  const ssize_t sent = ::send(lane.socket.fd(), piece.data, piece.bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (sent < 0) {
    if (try_again(errno)) return 0;
    throw Unreachable{piece.peer, std::string("the connection broke while sending: ") + std::strerror(errno)};
  }
  bytes_sent_.fetch_add(static_cast<uint64_t>(sent), std::memory_order_relaxed);
  advance(lane.out, static_cast<size_t>(sent), completed);
  return static_cast<size_t>(sent);
}

size_t SocketCarrier::receive_some(Lane& lane, std::vector<uint32_t>& completed) {
  const Piece& piece = lane.in.front();
  const ssize_t got = ::recv(lane.socket.fd(), piece.data, piece.bytes, MSG_DONTWAIT);
  if (got == 0) throw Unreachable{piece.peer, "it closed its connection without leaving the group"};
  if (got < 0) {
    if (try_again(errno)) return 0;
    throw Unreachable{piece.peer,
                      std::string("the connection broke while receiving: ") + std::strerror(errno)};
  }
  bytes_received_.fetch_add(static_cast<uint64_t>(got), std::memory_order_relaxed);
  advance(lane.in, static_cast<size_t>(got), completed);
  return static_cast<size_t>(got);
}

void SocketCarrier::append_polls(std::vector<pollfd>& polls) const {
  for (const auto& [rank, peer] : peers_) {
    for (const Lane& lane : peer.lanes) {
      const int events = (lane.in.empty() ? 0 : POLLIN) | (lane.out.empty() ? 0 : POLLOUT);
      if (events != 0) polls.push_back({lane.socket.fd(), static_cast<short>(events), 0});
    }
  }
}

std::vector<int> SocketCarrier::awaited() const {
  std::vector<int> ranks;
  for (const auto& [rank, peer] : peers_) {
    for (const Lane& lane : peer.lanes) {
      if (lane.in.empty() && lane.out.empty()) continue;
      ranks.push_back(rank);
      break;
    }
  }
  return ranks;
}

void SocketCarrier::abandon(int peer, bool incoming) {
  const auto entry = peers_.find(peer);
  if (entry == peers_.end()) return;
  for (Lane& lane : entry->second.lanes) (incoming ? lane.in : lane.out).clear();
}

}  // namespace mlsys::comm
