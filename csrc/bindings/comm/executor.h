// Runs one group's collectives one at a time, in the order of the calls. Knows neither torch nor Python.
//
// A task receives a null exception when it shall run and the reason when it shall not (the group has ended).
// The thread starts with the first task that needs it, never in the constructor, so an unused group may be
// forked.
//
// Two callers run tasks themselves instead of the thread:
//  - a caller that would wait at once anyway, when nothing is queued (saves two thread switches);
//  - a completion callback that submits from inside a task: the queue is drained up to and with its task
//    before submit returns, because the callback may wait for it and nobody else could run it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <thread>

namespace mlsys::binding {

class Executor {
 public:
  using Task = std::function<void(std::exception_ptr refusal)>;

  Executor() : state_(std::make_shared<State>()) {}
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;
  ~Executor() { join(); }

  void submit(Task task, bool caller_will_wait);

  // Runs `work` in its turn and returns when it has run; on the caller's thread, and without any allocation,
  // when nothing is before it. Throws what `work` throws, or the reason why it was not run.
  template <class Work>
  void run(Work&& work) {
    if (take_turn()) {
      const Turn turn(*this);
      work();
      return;
    }
    std::promise<void> done;
    submit(
        [&](std::exception_ptr refusal) {
          try {
            if (refusal) std::rethrow_exception(refusal);
            work();
            done.set_value();
          } catch (...) {
            done.set_exception(std::current_exception());
          }
        },
        false);
    done.get_future().get();
  }

  // Takes no more tasks, and gives those under way `grace` to finish. False when some are still left.
  bool close(std::chrono::milliseconds grace);
  // Refuses what is queued with `reason` and ends the thread; returns when the running task has returned.
  void stop(std::exception_ptr reason);

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable work;  // the thread waits here, for tasks and its end
    std::condition_variable idle;  // close() waits here
    std::deque<Task> queue;
    bool closed = false;
    bool stopping = false;
    std::exception_ptr reason;
    bool busy = false;       // somebody runs a task
    std::thread::id runner;  // who, while busy
    int num_closing = 0;

    void take_turn();
    // Wakes nobody unless somebody has a reason to wake: a caller's turn costs no system call.
    void end_turn();
  };
  class Turn {
   public:
    explicit Turn(Executor& executor) : executor_(executor) {}
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() { executor_.end_turn(); }

   private:
    Executor& executor_;
  };

  static void work(const std::shared_ptr<State>& state);
  static void run_next(State& state, std::unique_lock<std::mutex>& lock);
  // True when the caller may run at once; it must then end its turn.
  bool take_turn();
  void end_turn();
  void join();

  // The thread holds it too: it outlives an executor destroyed by its own task.
  std::shared_ptr<State> state_;
  std::thread thread_;
};

}  // namespace mlsys::binding
