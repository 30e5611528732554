// The handles that torch gets back: one for collectives, one for point-to-point operations.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "bindings/comm/failures.h"
#include "bindings/comm/record.h"
#include "comm/communicator.h"

namespace mlsys::binding {

// A future for a list of tensors that can be asked for before or after completion.
class LazyFuture {
 public:
  c10::intrusive_ptr<c10::ivalue::Future> get(const std::vector<at::Tensor>& outputs);
  void complete(const std::vector<at::Tensor>& outputs, std::exception_ptr failure);

 private:
  std::mutex mutex_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
  bool completed_ = false;
  std::exception_ptr failure_;
};

class CollectiveWork final : public c10d::Work {
 public:
  CollectiveWork(int rank, c10d::OpType type, const char* title, const std::vector<at::Tensor>& inputs,
                 std::vector<at::Tensor> outputs, Place place);

  // Called once by whoever ran, or refused, the operation.
  void complete(std::exception_ptr failure);

  // No timeout, or a negative one, waits as long as the operation itself may take.
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  std::vector<at::Tensor> result() override { return outputs_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_.get(outputs_); }
  uint64_t getSequencenumber() const override { return place_.sequence; }
  const Place& place() const { return place_; }

 private:
  const std::vector<at::Tensor> outputs_;
  const Place place_;
  LazyFuture future_;
};

class PointToPointWork final : public c10d::Work {
 public:
  PointToPointWork(int rank, c10d::OpType type, const char* title, at::Tensor tensor, Place place,
                   std::chrono::milliseconds group_timeout, std::shared_ptr<comm::Request> request,
                   Record record);

  bool isCompleted() override { return shared_->request->completed(); }
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  int sourceRank() const override { return shared_->request->source_rank(); }
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  std::vector<at::Tensor> result() override { return outputs_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return shared_->future.get(outputs_); }

 private:
  // What must live until the message has gone or come, also when the caller drops the handle: the request
  // keeps it through its completion callback, which empties `keep_alive` and so breaks the circle.
  struct Shared {
    std::shared_ptr<comm::Request> request;
    std::shared_ptr<Shared> keep_alive;
    std::vector<at::Tensor> outputs;
    Place place;
    Record record;
    LazyFuture future;
    std::function<void()> end_of_profile;
    std::exception_ptr failure() const;
  };

  const std::vector<at::Tensor> outputs_;
  const std::chrono::milliseconds group_timeout_;
  std::shared_ptr<Shared> shared_;
};

// Several operations, issued between startCoalescing() and endCoalescing(), as one.
class JoinedWork final : public c10d::Work {
 public:
  JoinedWork(int rank, std::vector<c10::intrusive_ptr<c10d::Work>> works)
      : c10d::Work(rank, c10d::OpType::COALESCED), works_(std::move(works)) {}

  bool isCompleted() override;
  bool isSuccess() const override;
  // Of the first that failed; null when none did.
  std::exception_ptr exception() const override;
  // Waits for all, in the order of the calls, and then throws what the first failure was. `timeout` is that
  // of each.
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  std::vector<at::Tensor> result() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;

 private:
  const std::vector<c10::intrusive_ptr<c10d::Work>> works_;
};

}  // namespace mlsys::binding
