#include "comm/p2p/mailbox.h"

#include <algorithm>
#include <cstring>

#include "comm/operation.h"

namespace mlsys::comm {
namespace {

constexpr size_t kDiscardBytes = 64 << 10;
// Memory for an unexpected message grows with what has really arrived, not with what its header promises.
constexpr size_t kGrowth = 1 << 20;

}  // namespace

void Mailbox::post(std::shared_ptr<MessageState> receive) {
  const auto found = std::find_if(unexpected_.begin(), unexpected_.end(),
                                  [&](const auto& m) { return matches(*receive, m->source, m->tag); });
  if (found == unexpected_.end()) {
    posted_.push_back(std::move(receive));
    return;
  }
  const std::shared_ptr<Inbound> message = *found;
  unexpected_.erase(found);
  const bool fits = size_fits(receive, *message);
  if (fits) message->receive = std::move(receive);
  if (message->offered) {
    claimed_.push_back(message);
  } else if (fits && message->received == message->bytes) {
    deliver(*message);
  }
}

std::shared_ptr<Inbound> Mailbox::begin(int source, const MessageHeader& header) {
  auto message = std::make_shared<Inbound>();
  message->source = source;
  message->tag = header.tag;
  message->bytes = header.bytes;
  match(message);
  if (message->bytes == 0) advance(message, 0);
  return message;
}

std::shared_ptr<Inbound> Mailbox::offer(int source, const MessageHeader& header, uint64_t connection) {
  auto message = std::make_shared<Inbound>();
  message->source = source;
  message->tag = header.tag;
  message->bytes = header.bytes;
  message->offered = true;
  message->connection = connection;
  message->id = header.id;
  match(message);
  if (message->direct) claimed_.push_back(message);
  message->direct = true;  // its payload never goes into `kept`
  return message;
}

void Mailbox::match(const std::shared_ptr<Inbound>& message) {
  const auto found = std::find_if(posted_.begin(), posted_.end(), [&](const auto& receive) {
    return matches(*receive, message->source, message->tag);
  });
  if (found == posted_.end()) {
    unexpected_.push_back(message);
    return;
  }
  const std::shared_ptr<MessageState> receive = *found;
  posted_.erase(found);
  message->direct = true;  // with the wrong size its payload is discarded: room() finds no receive
  if (size_fits(receive, *message)) message->receive = receive;
}

std::span<std::byte> Mailbox::room(Inbound& message, size_t wanted) {
  const size_t left = std::min(wanted, message.bytes - message.received);
  if (!message.direct) {
    if (message.kept.size() == message.received) {
      message.kept.resize(message.received + std::min(message.bytes - message.received, kGrowth));
    }
    return std::span(message.kept)
        .subspan(message.received)
        .first(std::min(left, message.kept.size() - message.received));
  }
  if (message.receive != nullptr && message.receive->data != nullptr) {
    return {message.receive->data + message.received, left};
  }
  discarded_.resize(kDiscardBytes);
  return std::span(discarded_).first(std::min(left, kDiscardBytes));
}

void Mailbox::advance(const std::shared_ptr<Inbound>& message, size_t bytes) {
  message->received += bytes;
  if (message->received == message->bytes && message->receive != nullptr) deliver(*message);
}

bool Mailbox::size_fits(const std::shared_ptr<MessageState>& receive, const Inbound& message) {
  if (receive->bytes == message.bytes) return true;
  ended_.push_back({receive, message.source,
                    std::make_exception_ptr(Mismatch(describe_size_mismatch(
                        name_(message.source), message.bytes, name_(rank_), receive->bytes)))});
  return false;
}

void Mailbox::deliver(const Inbound& message) {
  if (!message.direct && message.receive->data != nullptr && message.bytes != 0) {
    std::memcpy(message.receive->data, message.kept.data(), message.bytes);
  }
  ended_.push_back({message.receive, message.source, nullptr});
}

void Mailbox::break_off(const std::shared_ptr<Inbound>& message, std::exception_ptr error) {
  unexpected_.remove(message);
  std::erase(claimed_, message);
  if (message->receive != nullptr) ended_.push_back({message->receive, -1, std::move(error)});
}

void Mailbox::end_if(const std::function<std::exception_ptr(const MessageState&)>& hopeless) {
  for (auto receive = posted_.begin(); receive != posted_.end();) {
    std::exception_ptr error = hopeless(**receive);
    if (error == nullptr) {
      ++receive;
      continue;
    }
    ended_.push_back({*receive, -1, std::move(error)});
    receive = posted_.erase(receive);
  }
}

void Mailbox::end_all(std::exception_ptr error) {
  for (const auto& receive : posted_) ended_.push_back({receive, -1, error});
  posted_.clear();
  for (const auto& message : unexpected_) {
    if (message->receive != nullptr) ended_.push_back({message->receive, -1, error});
  }
  unexpected_.clear();
}

}  // namespace mlsys::comm
