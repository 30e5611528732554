// The messenger as a sender: calling a destination, writing frames to it, and reading its answers.
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "comm/p2p/messenger.h"

namespace mlsys::comm {
namespace {

using Clock = std::chrono::steady_clock;
using Kind = MessageHeader::Kind;

constexpr int kMostCalls = 20;

}  // namespace

void Messenger::break_outbound(Outbound& outbound, std::string why) {
  outbound.handshake.reset();
  outbound.socket.close();
  outbound.moved = 0;
  outbound.reply.clear();
  if (!outbound.waiting()) return;  // the receiver left when it had everything
  outbound.failure = std::move(why);
  outbound.failed_at = Clock::now();
}

// True when connected and authenticated.
bool Messenger::call(Links& links, int destination, Outbound& outbound) {
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
      break_outbound(outbound, "nobody listens there any more");
    }
  }
  if (outbound.handshake != nullptr) {
    const HandshakeState state = outbound.handshake->step();
    if (state == HandshakeState::kDone) {
      outbound.socket = Socket(outbound.handshake->take_fd());
      outbound.handshake.reset();
      outbound.num_calls = 0;
      return true;
    }
    if (state == HandshakeState::kFailed) {
      // A crowd of strangers may have pushed the call out of the receiver's waiting room.
      const bool again = !outbound.handshake->refused() && ++outbound.num_calls < kMostCalls;
      const std::string why = outbound.handshake->failure();
      outbound.handshake.reset();
      if (!again) break_outbound(outbound, why);
    }
  }
  if (!outbound.failure.empty() && (Clock::now() - outbound.failed_at > kGrace ||
                                    (links.faults->has_left(destination) && outbound.num_carried == 0))) {
    const std::string cause =
        links.faults->has_left(destination) ? "left the group" : "unreachable: " + outbound.failure;
    const std::exception_ptr error = peer_failed(links, destination, cause);
    for (auto& job : outbound.queue) {
      if (job.state != nullptr) ended_.push_back({job.state, -1, error});
    }
    for (auto& [id, state] : outbound.offered) ended_.push_back({state, -1, error});
    outbound.queue.clear();
    outbound.offered.clear();
    end_carried(destination, outbound, error);
    if (!outbound.carried) outbound.failure.clear();
  }
  return false;
}

void Messenger::push(Links& links, int destination, Outbound& outbound) {
  const bool remote = !links.topology.is_local(destination);
  outbound.carried = carries(links, destination);
  while (!outbound.queue.empty()) {
    Job& job = outbound.queue.front();
    const auto header = encode(job.header);
    const size_t payload_bytes = job.with_payload() && !outbound.carried ? job.state->bytes : 0;
    iovec parts[2];
    size_t num_parts = 0;
    const size_t payload = outbound.moved < header.size() ? 0 : outbound.moved - header.size();
    if (outbound.moved < header.size()) {
      parts[num_parts++] = {const_cast<uint8_t*>(header.data()) + outbound.moved,
                            header.size() - outbound.moved};
    }
    if (payload < payload_bytes) parts[num_parts++] = {job.state->data + payload, payload_bytes - payload};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = num_parts;
    const ssize_t sent = ::sendmsg(outbound.socket.fd(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno == EAGAIN || errno == EINTR) return;
      return break_outbound(outbound, std::strerror(errno));
    }
    outbound.moved += static_cast<size_t>(sent);
    if (outbound.moved < header.size() + payload_bytes) continue;
    if (job.with_payload() && outbound.carried && job.state->bytes != 0) {
      carry_out(destination, outbound, job.state);
    } else if (job.with_payload()) {
      if (remote) tcp_sent_.fetch_add(payload_bytes, std::memory_order_relaxed);
      ended_.push_back({job.state, options_.rank, nullptr});
    }
    outbound.queue.pop_front();
    outbound.moved = 0;
  }
}

void Messenger::read_replies(Links& links, int destination, Outbound& outbound) {
  for (;;) {
    uint8_t buffer[MessageHeader::kBytes];
    const ssize_t got =
        ::recv(outbound.socket.fd(), buffer, sizeof(buffer) - outbound.reply.size(), MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0) return break_outbound(outbound, got == 0 ? "it hung up" : std::strerror(errno));
    outbound.reply.insert(outbound.reply.end(), buffer, buffer + got);
    if (outbound.reply.size() < MessageHeader::kBytes) continue;
    const std::optional<MessageHeader> reply = decode_message_header(outbound.reply);
    outbound.reply.clear();
    if (!reply) return break_outbound(outbound, "it sent an invalid answer");
    on_reply(links, destination, outbound, *reply);
  }
}

void Messenger::on_reply(Links& links, int destination, Outbound& outbound, const MessageHeader& reply) {
  const auto found = outbound.offered.find(reply.id);
  if (found == outbound.offered.end()) return;
  const std::shared_ptr<MessageState> state = found->second;
  if (reply.kind == Kind::kTaken) {
    state->lent = false;
    ended_.push_back({state, options_.rank, nullptr});
    outbound.offered.erase(found);
    return;
  }
  if (reply.kind != Kind::kPull && reply.kind != Kind::kRefuse) return;
  const auto answer = [&](Kind kind, uint64_t place) {
    outbound.queue.push_back({{kind, state->tag, state->bytes, reply.id, place}, state});
  };
  if (reply.kind == Kind::kPull && links.topology.is_local(destination)) {
    const uint64_t offset = links.arena->offset_of(state->data, state->bytes);
    const bool in_arena = offset != Arena::kNoOffset;
    state->lent = true;
    return answer(in_arena ? Kind::kInArena : Kind::kInMemory,
                  in_arena ? offset : reinterpret_cast<uintptr_t>(state->data));
  }
  state->lent = false;
  answer(Kind::kPayload, 0);
  outbound.offered.erase(found);
}

}  // namespace mlsys::comm
