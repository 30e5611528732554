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
    state.busy = true;
    state.runner = std::this_thread::get_id();
    run_next(state, lock);
    state.busy = false;
    state.runner = {};
    lock.unlock();
    state.changed.notify_all();
    return;
  }
  if (!thread_.joinable()) thread_ = std::thread(work, state_);
  lock.unlock();
  state.changed.notify_all();
}

bool Executor::close(std::chrono::milliseconds grace) {
  State& state = *state_;
  std::unique_lock lock(state.mutex);
  state.closed = true;
  if (state.busy && state.runner == std::this_thread::get_id()) return state.queue.empty();
  return state.changed.wait_for(lock, grace, [&] { return state.queue.empty() && !state.busy; });
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
  state.changed.notify_all();
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
    state.changed.wait(lock, [&] { return state.stopping || (!state.queue.empty() && !state.busy); });
    if (state.stopping) return;
    state.busy = true;
    state.runner = std::this_thread::get_id();
    run_next(state, lock);
    state.busy = false;
    state.runner = {};
    state.changed.notify_all();
  }
}

void Executor::join() {
  {
    std::unique_lock lock(state_->mutex);
    state_->closed = state_->stopping = true;
  }
  state_->changed.notify_all();
  if (!thread_.joinable()) return;
  if (thread_.get_id() == std::this_thread::get_id()) {
    thread_.detach();  // the last owner of the group was a task of its own; the thread ends after that task
  } else {
    thread_.join();
  }
}

}  // namespace mlsys::binding
