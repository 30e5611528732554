// What the caller of a send or receive holds; letting go of it abandons the operation.
#pragma once

#include <memory>
#include <mutex>

#include "comm/p2p/message.h"

namespace mlsys::comm {

class MessageRequest final : public Request {
 public:
  MessageRequest(std::shared_ptr<std::mutex> messenger_mutex, std::shared_ptr<MessageState> state,
                 std::chrono::milliseconds timeout);
  ~MessageRequest() override;

  bool completed() const override { return state_->completed(); }
  int source_rank() const override { return state_->source(); }
  void on_completion(std::function<void()> callback) override { state_->on_completion(std::move(callback)); }
  void wait(std::chrono::milliseconds timeout) override;

 private:
  std::shared_ptr<std::mutex> messenger_mutex_;
  std::shared_ptr<MessageState> state_;
  std::chrono::milliseconds timeout_;
};

}  // namespace mlsys::comm
