// What the caller of a send or receive holds; letting go of it abandons the operation.
#pragma once

#include <memory>
#include <mutex>

#include "comm/fault/faults.h"
#include "comm/p2p/message.h"

namespace mlsys::comm {

// Where a request that times out asks what the others are doing; null before the group connects and after it
// ended. Shared, because a request may outlive its messenger.
struct Informant {
  std::mutex mutex;
  const Faults* faults = nullptr;
};

class MessageRequest final : public Request {
 public:
  MessageRequest(std::shared_ptr<std::mutex> messenger_mutex, std::shared_ptr<MessageState> state,
                 std::shared_ptr<Informant> informant, std::chrono::milliseconds timeout);
  ~MessageRequest() override;

  bool completed() const override { return state_->completed(); }
  int source_rank() const override { return state_->source(); }
  void before_completion(std::function<void(bool succeeded)> callback) override {
    state_->before_completion(std::move(callback));
  }
  void on_completion(std::function<void()> callback) override { state_->on_completion(std::move(callback)); }
  void wait(std::chrono::milliseconds timeout) override;

 private:
  std::shared_ptr<std::mutex> messenger_mutex_;
  std::shared_ptr<MessageState> state_;
  std::shared_ptr<Informant> informant_;
  std::chrono::milliseconds timeout_;
};

}  // namespace mlsys::comm
