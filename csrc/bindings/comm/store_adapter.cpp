#include "bindings/comm/store_adapter.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

namespace mlsys::binding {
namespace {

using std::chrono::microseconds;
using std::chrono::steady_clock;

class C10dStore final : public InterruptibleStore {
 public:
  explicit C10dStore(c10::intrusive_ptr<c10d::Store> store) : original_(std::move(store)) {}

  void set(const std::string& key, const std::vector<uint8_t>& value) override { current().set(key, value); }

  // Asks again and again instead of c10d's blocking wait, which could not be interrupted. The pause grows
  // with the time already waited, so that a quick answer is seen quickly and a slow one costs the server
  // little.
  std::vector<uint8_t> get(const std::string& key, std::chrono::milliseconds timeout) override {
    c10d::Store& store = current();
    const auto start = steady_clock::now();
    while (!store.check({key})) {
      const auto waited = std::chrono::duration_cast<microseconds>(steady_clock::now() - start);
      if (interrupted_.load()) {
        throw std::runtime_error("the process group was shut down while it waited for a peer's address (" +
                                 key + ")");
      }
      if (waited >= timeout) {
        throw comm::TimedOut("no peer published '" + key + "' in the store within " +
                             std::to_string(timeout.count()) + " ms: that rank has not come to this group.");
      }
      std::this_thread::sleep_for(
          std::clamp<microseconds>(waited / 8, microseconds(200), microseconds(50000)));
    }
    return store.get(key);
  }

  void interrupt() override { interrupted_.store(true); }

  void separate(std::chrono::milliseconds timeout) override {
    const std::lock_guard lock(mutex_);
    if (clone_) return;
    const auto usual = original_->getTimeout();
    original_->setTimeout(timeout);  // a clone inherits it, and connects within it
    try {
      clone_ = original_->clone();
    } catch (...) {
      original_->setTimeout(usual);
      throw;
    }
    original_->setTimeout(usual);
  }

 private:
  c10d::Store& current() {
    const std::lock_guard lock(mutex_);
    return clone_ ? *clone_ : *original_;
  }

  const c10::intrusive_ptr<c10d::Store> original_;
  c10::intrusive_ptr<c10d::Store> clone_;
  std::mutex mutex_;  // guards clone_
  std::atomic<bool> interrupted_{false};
};

}  // namespace

std::shared_ptr<InterruptibleStore> adapt_store(c10::intrusive_ptr<c10d::Store> store) {
  return std::make_shared<C10dStore>(std::move(store));
}

}  // namespace mlsys::binding
