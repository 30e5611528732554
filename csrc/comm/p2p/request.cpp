#include "comm/p2p/request.h"

#include <string>

namespace mlsys::comm {

MessageRequest::MessageRequest(std::shared_ptr<std::mutex> messenger_mutex,
                               std::shared_ptr<MessageState> state, std::chrono::milliseconds timeout)
    : messenger_mutex_(std::move(messenger_mutex)), state_(std::move(state)), timeout_(timeout) {}

// The caller's buffer may be gone from now on: an unfinished receive discards its message, and an unfinished
// send goes on from a copy.
MessageRequest::~MessageRequest() {
  const std::lock_guard lock(*messenger_mutex_);
  if (state_->completed()) return;
  if (state_->direction == MessageState::Direction::kSend) {
    state_->owned.assign(state_->data, state_->data + state_->bytes);
    state_->data = state_->owned.data();
  } else {
    state_->data = nullptr;
  }
}

void MessageRequest::wait(std::chrono::milliseconds timeout) {
  const auto limit = timeout.count() == 0 ? timeout_ : timeout;
  if (state_->wait_until(std::chrono::steady_clock::now() + limit)) return;
  const bool sending = state_->direction == MessageState::Direction::kSend;
  throw TimedOut(std::string(sending ? "a send to " : "a receive from ") +
                 (state_->peer < 0 ? "any rank" : "group rank " + std::to_string(state_->peer)) + " (tag " +
                 std::to_string(state_->tag) + ", " + std::to_string(state_->bytes) +
                 " bytes) timed out after " + std::to_string(limit.count()) + " ms.");
}

}  // namespace mlsys::comm
