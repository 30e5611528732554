#include "bindings/comm/work.h"

#include <algorithm>
#include <utility>

namespace mlsys::binding {

using c10::ivalue::Future;
using std::chrono::milliseconds;

c10::intrusive_ptr<Future> LazyFuture::get(const std::vector<at::Tensor>& outputs) {
  std::unique_lock lock(mutex_);
  if (future_) return future_;
  future_ = c10::make_intrusive<Future>(c10::ListType::create(c10::TensorType::get()));
  if (completed_) {
    if (failure_) {
      future_->setError(failure_);
    } else {
      future_->markCompleted(c10::IValue(outputs));
    }
  }
  return future_;
}

void LazyFuture::complete(const std::vector<at::Tensor>& outputs, std::exception_ptr failure) {
  c10::intrusive_ptr<Future> future;
  {
    std::unique_lock lock(mutex_);
    completed_ = true;
    failure_ = failure;
    future = future_;
  }
  if (!future) return;
  if (failure) {
    future->setError(failure);
  } else {
    future->markCompleted(c10::IValue(outputs));
  }
}

CollectiveWork::CollectiveWork(int rank, c10d::OpType type, const char* title,
                               const std::vector<at::Tensor>& inputs, std::vector<at::Tensor> outputs,
                               Place place)
    : c10d::Work(rank, type, title, inputs), outputs_(std::move(outputs)), place_(std::move(place)) {}

void CollectiveWork::complete(std::exception_ptr failure) {
  future_.complete(outputs_, failure);  // first, so that whoever returns from wait() finds the future done
  finish(failure);
}

bool CollectiveWork::wait(milliseconds timeout) {
  std::unique_lock lock(mutex_);
  const auto done = [this] { return completed_; };
  if (timeout <= kNoTimeout) {
    cv_.wait(lock, done);
  } else if (!cv_.wait_for(lock, timeout, done)) {
    std::rethrow_exception(for_python(std::make_exception_ptr(comm::TimedOut(
                                          "wait(timeout) ended after " + std::to_string(timeout.count()) +
                                          " ms and the operation is still under way.")),
                                      place_));
  }
  if (exception_) std::rethrow_exception(exception_);
  return true;
}

std::exception_ptr PointToPointWork::Shared::failure() const {
  try {
    request->wait(milliseconds(0));
    return nullptr;
  } catch (...) {
    return for_python(std::current_exception(), place);
  }
}

PointToPointWork::PointToPointWork(int rank, c10d::OpType type, const char* title, at::Tensor tensor,
                                   Place place, milliseconds group_timeout,
                                   std::shared_ptr<comm::Request> request, Record record)
    : c10d::Work(rank, type, title, std::vector<at::Tensor>{tensor}),
      outputs_{std::move(tensor)},
      group_timeout_(group_timeout),
      shared_(std::make_shared<Shared>()) {
  shared_->request = std::move(request);
  shared_->outputs = outputs_;
  shared_->place = std::move(place);
  shared_->record = std::move(record);
  shared_->keep_alive = shared_;
  // Whoever has waited may end the profiler, or dump the recorder, and finds this event complete there.
  shared_->end_of_profile = std::exchange(recordFunctionEndCallback_, nullptr);
  shared_->request->before_completion([shared = shared_.get()](bool succeeded) {
    if (shared->end_of_profile) shared->end_of_profile();
    if (succeeded) shared->record.completed();
  });
  shared_->request->on_completion([shared = shared_.get()] {
    const auto alive = std::exchange(shared->keep_alive, nullptr);
    const auto failure = alive->failure();
    alive->future.complete(alive->outputs, failure);
  });
}

bool PointToPointWork::isSuccess() const {
  return shared_->request->completed() && shared_->failure() == nullptr;
}

std::exception_ptr PointToPointWork::exception() const {
  return shared_->request->completed() ? shared_->failure() : nullptr;
}

bool PointToPointWork::wait(milliseconds timeout) {
  try {
    shared_->request->wait(timeout > kNoTimeout ? timeout : group_timeout_);
  } catch (...) {
    shared_->record.failed(std::current_exception());
    std::rethrow_exception(for_python(std::current_exception(), shared_->place));
  }
  return true;
}

bool JoinedWork::isCompleted() {
  return std::all_of(works_.begin(), works_.end(), [](const auto& work) { return work->isCompleted(); });
}

bool JoinedWork::isSuccess() const {
  return std::all_of(works_.begin(), works_.end(), [](const auto& work) { return work->isSuccess(); });
}

std::exception_ptr JoinedWork::exception() const {
  for (const auto& work : works_) {
    if (auto failure = work->exception()) return failure;
  }
  return nullptr;
}

bool JoinedWork::wait(milliseconds timeout) {
  std::exception_ptr first;
  for (const auto& work : works_) {
    try {
      work->wait(timeout);
    } catch (...) {
      if (!first) first = std::current_exception();
    }
  }
  if (first) std::rethrow_exception(first);
  return true;
}

std::vector<at::Tensor> JoinedWork::result() {
  std::vector<at::Tensor> all;
  for (const auto& work : works_) {
    const auto some = work->result();
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

c10::intrusive_ptr<Future> JoinedWork::getFuture() {
  auto joined = c10::make_intrusive<Future>(c10::ListType::create(c10::TensorType::get()));
  auto left = std::make_shared<std::atomic<size_t>>(works_.size());
  auto outputs = result();
  if (works_.empty()) joined->markCompleted(c10::IValue(outputs));
  for (const auto& work : works_) {
    work->getFuture()->addCallback([joined, left, outputs](Future& done) {
      if (done.hasError()) {
        joined->setErrorIfNeeded(done.exception_ptr());
      } else if (left->fetch_sub(1) == 1) {
        joined->markCompleted(c10::IValue(outputs));
      }
    });
  }
  return joined;
}

}  // namespace mlsys::binding
