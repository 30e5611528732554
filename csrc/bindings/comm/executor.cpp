#include "bindings/comm/executor.h"

#include <pthread.h>

#include <stdexcept>
#include <utility>

namespace mlsys::binding {

void Executor::submit(Task task, bool caller_will_wait) {
  State& state = *state_;
  std::unique_lock lock(state.mutex);
  if (state.closed) {
    auto reason = state.reason
                      ? state.reason
                      : std::make_exception_ptr(std::runtime_error("the process group was shut down"));
    lock.unlock();
    task(reason);
    return;
  }
  const bool from_callback = state.busy && state.runner == std::this_thread::get_id();
  const bool run_here = caller_will_wait && !state.busy && state.queue.empty();
  state.queue.push_back(std::move(task));
  if (from_callback) {
    while (!state.queue.empty()) run_next(state, lock);
    return;
  }
  if (run_here) {
    state.take_turn();
    run_next(state, lock);
    state.end_turn();
    return;
  }
  if (!thread_.joinable()) thread_ = std::thread(work, state_);
  lock.unlock();
  state.work.notify_one();
}

void Executor::State::take_turn() {
  busy = true;
  runner = std::this_thread::get_id();
}

void Executor::State::end_turn() {
  busy = false;
  runner = {};
  if (!queue.empty()) work.notify_one();
  if (num_closing != 0) idle.notify_all();
}

bool Executor::take_turn() {
  const std::lock_guard lock(state_->mutex);
  if (state_->closed || state_->busy || !state_->queue.empty()) return false;
  state_->take_turn();
  return true;
}

void Executor::end_turn() {
  const std::lock_guard lock(state_->mutex);
  state_->end_turn();
}

bool Executor::close(std::chrono::milliseconds grace) {
  State& state = *state_;
  std::unique_lock lock(state.mutex);
  state.closed = true;
  if (state.busy && state.runner == std::this_thread::get_id()) return state.queue.empty();
  ++state.num_closing;
  const bool finished = state.idle.wait_for(lock, grace, [&] { return state.queue.empty() && !state.busy; });
  --state.num_closing;
  return finished;
}

void Executor::stop(std::exception_ptr reason) {
  State& state = *state_;
  std::deque<Task> refused;
  {
    std::unique_lock lock(state.mutex);
    state.closed = state.stopping = true;
    state.reason = reason;
    refused.swap(state.queue);
  }
  state.work.notify_all();
  for (Task& task : refused) task(reason);
  join();
}

// The caller holds the token (`busy`) and the lock; the lock is released while the task runs and is
// destroyed.
void Executor::run_next(State& state, std::unique_lock<std::mutex>& lock) {
  Task task = std::move(state.queue.front());
  state.queue.pop_front();
  lock.unlock();
  task(nullptr);
  task = nullptr;
  lock.lock();
}

void Executor::work(const std::shared_ptr<State>& shared) {
  pthread_setname_np(pthread_self(), "mlsys-comm");
  State& state = *shared;
  std::unique_lock lock(state.mutex);
  while (true) {
    state.work.wait(lock, [&] { return state.stopping || (!state.queue.empty() && !state.busy); });
    if (state.stopping) return;
    state.take_turn();
    run_next(state, lock);
    state.end_turn();
  }
}

void Executor::join() {
  {
    std::unique_lock lock(state_->mutex);
    state_->closed = state_->stopping = true;
  }
  state_->work.notify_all();
  if (!thread_.joinable()) return;
  if (thread_.get_id() == std::this_thread::get_id()) {
    thread_.detach();  // the last owner of the group was a task of its own; the thread ends after that task
  } else {
    thread_.join();
  }
}

}  // namespace mlsys::binding
