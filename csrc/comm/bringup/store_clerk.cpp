#include "comm/bringup/store_clerk.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <future>
#include <mutex>
#include <thread>

namespace mlsys::comm {
namespace {

constexpr std::chrono::milliseconds kBetweenChecks{5};

StoreClerk::Answer look(Store& store, const std::string& key) {
  try {
    return store.get(key, std::chrono::milliseconds(0));
  } catch (const TimedOut&) {
    return std::nullopt;
  }
}

}  // namespace

struct StoreClerk::State {
  explicit State(std::shared_ptr<Store> asked) : store(std::move(asked)) {}

  void run() {
    std::unique_lock lock(mutex);
    for (;;) {
      work.wait(lock, [this] { return closing || !questions.empty(); });
      if (questions.empty()) break;
      std::packaged_task<Answer(Store&)> question = std::move(questions.front());
      questions.pop_front();
      lock.unlock();
      question(*store);
      lock.lock();
    }
  }

  const std::shared_ptr<Store> store;
  std::mutex mutex;
  std::condition_variable work;
  std::deque<std::packaged_task<Answer(Store&)>> questions;
  std::atomic<int> num_unanswered{0};
  bool closing = false;
  std::thread thread;
};

StoreClerk::StoreClerk(std::shared_ptr<Store> store) : state_(std::make_shared<State>(std::move(store))) {
  state_->thread = std::thread([state = state_] {
    ::pthread_setname_np(::pthread_self(), "mlsys-store");
    state->run();
  });
}

StoreClerk::~StoreClerk() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->closing = true;
  }
  state_->work.notify_all();
  is_silent() ? state_->thread.detach() : state_->thread.join();
}

bool StoreClerk::is_silent() const { return state_->num_unanswered.load() != 0; }

StoreClerk::Answer StoreClerk::ask(std::function<Answer(Store&)> question,
                                   const std::function<void()>& expect_time) {
  ++state_->num_unanswered;
  std::packaged_task<Answer(Store&)> task(
      [question = std::move(question), state = state_.get()](Store& store) {
        struct Answered {
          State* state;
          ~Answered() { --state->num_unanswered; }
        } answered{state};
        return question(store);
      });
  std::future<Answer> answer = task.get_future();
  {
    const std::lock_guard lock(state_->mutex);
    state_->questions.push_back(std::move(task));
  }
  state_->work.notify_all();
  while (answer.wait_for(kBetweenChecks) != std::future_status::ready) expect_time();
  return answer.get();
}

void StoreClerk::set(const std::string& key, const Value& value, const std::function<void()>& expect_time) {
  ask(
      [key, value](Store& store) {
        store.set(key, value);
        return Answer();
      },
      expect_time);
}

StoreClerk::Answer StoreClerk::look_up(const std::string& key, const std::function<void()>& expect_time) {
  return ask([key](Store& store) { return look(store, key); }, expect_time);
}

StoreClerk::Answer StoreClerk::set_first(const std::string& key, const Value& value,
                                         const std::function<void()>& expect_time) {
  return ask(
      [key, value](Store& store) {
        Answer earlier = look(store, key);
        if (!earlier) store.set(key, value);
        return earlier;
      },
      expect_time);
}

}  // namespace mlsys::comm
