#include "comm/p2p/request.h"

#include <string>

namespace mlsys::comm {

MessageRequest::MessageRequest(std::shared_ptr<std::mutex> messenger_mutex,
                               std::shared_ptr<MessageState> state, std::shared_ptr<Informant> informant,
                               std::chrono::milliseconds timeout)
    : messenger_mutex_(std::move(messenger_mutex)),
      state_(std::move(state)),
      informant_(std::move(informant)),
      timeout_(timeout) {}

// The caller's buffer may be gone from now on: an unfinished receive discards its message, and an unfinished
// send goes on from a copy; but one that the receiver is reading in place must first come to its end.
MessageRequest::~MessageRequest() {
  std::unique_lock lock(*messenger_mutex_);
  while (state_->lent && !state_->completed()) {
    lock.unlock();
    (void)state_->wait_quietly(std::chrono::milliseconds(100));
    lock.lock();
  }
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
  const std::string what = std::string(sending ? "a send to " : "a receive from ") +
                           (state_->peer < 0 ? "any rank" : "group rank " + std::to_string(state_->peer)) +
                           " (tag " + std::to_string(state_->tag) + ", " + std::to_string(state_->bytes) +
                           " bytes) timed out after " + std::to_string(limit.count()) + " ms.";
  const std::lock_guard lock(informant_->mutex);
  if (informant_->faults != nullptr) informant_->faults->give_up_message(state_->peer, what);
  throw TimedOut(what);
}

}  // namespace mlsys::comm
