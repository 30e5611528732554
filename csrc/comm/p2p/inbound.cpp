// The messenger as a receiver: reading frames from a source, answering its offers, fetching what lies in its
// memory.
#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>

#include "comm/p2p/messenger.h"

namespace mlsys::comm {
namespace {

using Clock = std::chrono::steady_clock;
using Kind = MessageHeader::Kind;

// One source may not keep the others waiting for more than this at a time.
constexpr size_t kTurnBytes = 4 << 20;

}  // namespace

bool Messenger::end_source(Links& links, Source& source, const std::string& why) {
  const std::exception_ptr error = peer_failed(links, source.peer, why);
  if (source.message != nullptr) mailbox_.break_off(source.message, error);
  for (const auto& [id, message] : source.offers) mailbox_.break_off(message, error);
  end_carried(source, error);
  return false;
}

bool Messenger::break_source(Source& source, std::string why) {
  if (!source.waiting()) return false;  // the sender left when everything had been taken
  source.socket.close();
  source.fetching.clear();
  source.failure = std::move(why);
  source.failed_at = Clock::now();
  return true;
}

// The watch thread's verdict, when there is one, ends everything: see run().
bool Messenger::judge_source(Links& links, Source& source) {
  if (!source.waiting()) return false;  // what was under way came to its end
  const bool early = Clock::now() - source.failed_at < kGrace;
  if (source.num_carried != 0 && early) return true;  // its payload does not come by the connection
  if (links.faults->has_left(source.peer)) return end_source(links, source, "left the group");
  if (early) return true;
  return end_source(links, source, source.failure);
}

bool Messenger::pull(Links& links, Source& source) {
  const bool remote = !links.topology.is_local(source.peer);
  for (size_t turn = 0; turn < kTurnBytes;) {
    uint8_t header[MessageHeader::kBytes];
    std::span<std::byte> room(reinterpret_cast<std::byte*>(header),
                              MessageHeader::kBytes - source.header.size());
    if (source.message != nullptr) room = mailbox_.room(*source.message, kTurnBytes);
    const ssize_t got = ::recv(source.socket.fd(), room.data(), room.size(), MSG_DONTWAIT);
    if (got == 0) return break_source(source, "its connection ended in the middle of a message");
    if (got < 0) {
      if (errno == EAGAIN || errno == EINTR) return true;
      return break_source(source, std::string("the connection broke: ") + std::strerror(errno));
    }
    turn += static_cast<size_t>(got);
    if (source.message != nullptr) {
      (remote ? tcp_received_ : local_received_)
          .fetch_add(static_cast<uint64_t>(got), std::memory_order_relaxed);
      mailbox_.advance(source.message, static_cast<size_t>(got));
    } else {
      source.header.insert(source.header.end(), header, header + got);
      if (source.header.size() < MessageHeader::kBytes) continue;
      const std::optional<MessageHeader> decoded = decode_message_header(source.header);
      source.header.clear();
      if (!decoded || !on_header(source, *decoded)) {
        return end_source(links, source, "it sent an invalid message header");
      }
    }
    if (source.message != nullptr && source.message->received == source.message->bytes) {
      source.message = nullptr;
    } else if (source.message != nullptr && carries(links, source.peer)) {
      carry_in(source, std::exchange(source.message, nullptr));
    }
  }
  return true;
}

// False when the header makes no sense here.
bool Messenger::on_header(Source& source, const MessageHeader& header) {
  if (header.kind == Kind::kEager) {
    source.message = mailbox_.begin(source.peer, header);
    return true;
  }
  if (header.kind == Kind::kOffer) {
    if (source.offers.contains(header.id)) return false;
    source.offers[header.id] = mailbox_.offer(source.peer, header, source.connection);
    return true;
  }
  const auto offer = source.offers.find(header.id);
  if (offer == source.offers.end() || offer->second->bytes != header.bytes) return false;
  if (header.kind == Kind::kPayload) {
    source.message = offer->second;
    source.offers.erase(offer);
    return true;
  }
  if (header.kind != Kind::kInArena && header.kind != Kind::kInMemory) return false;
  source.fetching.emplace_back(offer->second, header);
  return true;
}

// Asks for the payloads that receives have claimed, and lets go of those that nobody wants.
void Messenger::answer_claims() {
  for (const std::shared_ptr<Inbound>& message : mailbox_.take_claimed()) {
    for (Source& source : sources_) {
      if (source.connection != message->connection) continue;
      const bool wanted = message->receive != nullptr;
      reply(source, wanted ? Kind::kPull : Kind::kTaken, message->id);
      if (!wanted) source.offers.erase(message->id);
      (void)flush_replies(source);  // a broken connection shows in the next round
    }
  }
}

void Messenger::reply(Source& source, Kind kind, uint64_t id) {
  const auto bytes = encode(MessageHeader{kind, 0, 0, id, 0});
  source.replies.insert(source.replies.end(), bytes.begin(), bytes.end());
}

// Copies a part of what lies in the source's memory, at most kTurnBytes.
bool Messenger::fetch(Links& links, Source& source) {
  if (source.fetching.empty()) return true;
  const auto [message, header] = source.fetching.front();
  const auto finish = [&](Kind kind) {
    reply(source, kind, message->id);
    if (kind == Kind::kTaken) source.offers.erase(message->id);
    source.fetching.pop_front();
    return true;
  };
  const std::span<std::byte> room = mailbox_.room(*message, kTurnBytes);
  size_t got = room.size();
  if (header.kind == Kind::kInArena) {
    const Mapping& arena =
        links.peer_arenas[static_cast<size_t>(links.topology.local_of[static_cast<size_t>(source.peer)])];
    if (header.bytes > arena.bytes() || header.place > arena.bytes() - header.bytes) {
      return end_source(links, source, "it offered memory outside its arena");
    }
    std::memcpy(room.data(), arena.data() + header.place + message->received, got);
  } else {
    if (!links.readable[static_cast<size_t>(source.peer)]) return finish(Kind::kRefuse);
    const auto pid = static_cast<pid_t>(links.topology.members[static_cast<size_t>(source.peer)].pid);
    iovec into{room.data(), room.size()};
    iovec from{reinterpret_cast<void*>(header.place + message->received), room.size()};
    const ssize_t copied = ::process_vm_readv(pid, &into, 1, &from, 1, 0);
    if (copied <= 0) {
      if (message->received != 0) return break_source(source, "its memory could not be read");
      links.readable[static_cast<size_t>(source.peer)] = false;  // not permitted here: do not try again
      return finish(Kind::kRefuse);
    }
    got = static_cast<size_t>(copied);
  }
  // What a rank lent before it left, or before the group failed, may be something else by now.
  if (links.faults->has_left(source.peer)) return end_source(links, source, "left the group");
  links.faults->check();
  local_received_.fetch_add(got, std::memory_order_relaxed);
  mailbox_.advance(message, got);
  return message->received == message->bytes ? finish(Kind::kTaken) : true;
}

// False when the connection is broken.
bool Messenger::flush_replies(Source& source) {
  if (source.replies.empty()) return true;
  const ssize_t sent =
      ::send(source.socket.fd(), source.replies.data(), source.replies.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  if (sent > 0) source.replies.erase(source.replies.begin(), source.replies.begin() + sent);
  return true;
}

}  // namespace mlsys::comm
