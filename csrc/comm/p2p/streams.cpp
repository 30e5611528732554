// The messenger's connections: calling a destination, writing to it, reading from a source.
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "comm/p2p/messenger.h"

namespace mlsys::comm {
namespace {

using Clock = std::chrono::steady_clock;

// How long a broken connection waits for the watch thread to name the reason.
constexpr std::chrono::milliseconds kGrace{300};
// One source may not keep the others waiting for more than this at a time.
constexpr size_t kTurnBytes = 4 << 20;

}  // namespace

// True when connected and authenticated.
bool Messenger::call(Links& links, int destination, Outbound& outbound) {
  const auto fail = [&](std::string why) {
    outbound.handshake.reset();
    outbound.socket.close();
    outbound.moved = 0;
    outbound.failure = std::move(why);
    outbound.failed_at = Clock::now();
  };
  if (outbound.socket) return true;
  if (outbound.failure.empty() && outbound.handshake == nullptr) {
    const MessageEndpoint& endpoint = links.message_endpoints[static_cast<size_t>(destination)];
    bool busy = false;
    UniqueFd fd = links.topology.is_local(destination) ? connect_unix(endpoint.unix_name, &busy)
                                                       : connect_tcp(endpoint.tcp);
    if (busy) return false;  // a crowd at its door: the next round tries again
    if (fd) {
      outbound.handshake = std::make_unique<Handshake>(
          Handshake::call(std::move(fd), links.credentials, Purpose::kPointToPoint, destination));
    } else {
      fail("nobody listens there any more");
    }
  }
  if (outbound.handshake != nullptr) {
    const HandshakeState state = outbound.handshake->step();
    if (state == HandshakeState::kDone) {
      outbound.socket = Socket(outbound.handshake->take_fd());
      outbound.handshake.reset();
      return true;
    }
    if (state == HandshakeState::kFailed) fail(outbound.handshake->failure());
  }
  if (!outbound.failure.empty() &&
      (Clock::now() - outbound.failed_at > kGrace || links.faults->has_left(destination))) {
    const std::string cause =
        links.faults->has_left(destination) ? "left the group" : "unreachable: " + outbound.failure;
    for (auto& state : outbound.queue) ended_.push_back({state, -1, peer_failed(links, destination, cause)});
    outbound.queue.clear();
    outbound.failure.clear();
  }
  return false;
}

void Messenger::push(Links& links, int destination, Outbound& outbound) {
  const bool remote = !links.topology.is_local(destination);
  while (!outbound.queue.empty()) {
    MessageState& state = *outbound.queue.front();
    const auto header = encode(MessageHeader{state.tag, state.bytes});
    iovec parts[2];
    int num_parts = 0;
    size_t payload = 0;
    if (outbound.moved < header.size()) {
      parts[num_parts++] = {const_cast<uint8_t*>(header.data()) + outbound.moved,
                            header.size() - outbound.moved};
    } else {
      payload = outbound.moved - header.size();
    }
    if (payload < state.bytes) parts[num_parts++] = {state.data + payload, state.bytes - payload};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = static_cast<size_t>(num_parts);
    const ssize_t sent = ::sendmsg(outbound.socket.fd(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno == EAGAIN || errno == EINTR) return;
      outbound.failure = std::strerror(errno);
      outbound.failed_at = Clock::now();
      outbound.socket.close();
      outbound.moved = 0;
      return;
    }
    outbound.moved += static_cast<size_t>(sent);
    if (outbound.moved < header.size() + state.bytes) continue;
    if (remote) tcp_sent_.fetch_add(state.bytes, std::memory_order_relaxed);
    ended_.push_back({outbound.queue.front(), options_.rank, nullptr});
    outbound.queue.pop_front();
    outbound.moved = 0;
  }
}

bool Messenger::pull(Links& links, Source& source) {
  const bool remote = !links.topology.is_local(source.peer);
  const auto ended = [&](const std::string& why) {
    if (source.message != nullptr) mailbox_.break_off(source.message, peer_failed(links, source.peer, why));
    return false;
  };
  for (size_t turn = 0; turn < kTurnBytes;) {
    uint8_t header[MessageHeader::kBytes];
    std::span<std::byte> room(reinterpret_cast<std::byte*>(header),
                              MessageHeader::kBytes - source.header.size());
    if (source.message != nullptr) room = mailbox_.room(*source.message, kTurnBytes);
    const ssize_t got = ::recv(source.socket.fd(), room.data(), room.size(), MSG_DONTWAIT);
    if (got == 0) return ended("its connection ended in the middle of a message");
    if (got < 0) {
      if (errno == EAGAIN || errno == EINTR) return true;
      return ended(std::string("the connection broke: ") + std::strerror(errno));
    }
    turn += static_cast<size_t>(got);
    if (source.message == nullptr) {
      source.header.insert(source.header.end(), header, header + got);
      if (source.header.size() < MessageHeader::kBytes) continue;
      const std::optional<MessageHeader> decoded = decode_message_header(source.header);
      source.header.clear();
      if (!decoded) return ended("it sent an invalid message header");
      source.message = mailbox_.begin(source.peer, *decoded);
    } else {
      (remote ? tcp_received_ : local_received_)
          .fetch_add(static_cast<uint64_t>(got), std::memory_order_relaxed);
      mailbox_.advance(source.message, static_cast<size_t>(got));
    }
    if (source.message->received == source.message->bytes) source.message = nullptr;
  }
  return true;
}

}  // namespace mlsys::comm
