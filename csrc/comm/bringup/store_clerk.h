// Uses the store on a thread of its own: a server whose process is stopped answers nothing and refuses
// nothing, and must not hold up whoever asks.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace mlsys::comm {

class StoreClerk {
 public:
  using Value = std::vector<uint8_t>;
  using Answer = std::optional<Value>;  // nothing when the key is missing

  explicit StoreClerk(std::shared_ptr<Store> store);
  // What is still asked of a store that does not answer is done when it does: the thread stays until then.
  ~StoreClerk();
  StoreClerk(const StoreClerk&) = delete;
  StoreClerk& operator=(const StoreClerk&) = delete;

  // These wait for the answer and throw the store's errors. `expect_time` is called again and again
  // meanwhile, and ends the wait by throwing; what was asked is still done when the store answers.
  void set(const std::string& key, const Value& value, const std::function<void()>& expect_time);
  Answer look_up(const std::string& key, const std::function<void()>& expect_time);
  // Sets the key unless somebody was first; what is there already is returned.
  Answer set_first(const std::string& key, const Value& value, const std::function<void()>& expect_time);
  // Whether a question that was given up is still unanswered.
  bool is_silent() const;

 private:
  struct State;

  Answer ask(std::function<Answer(Store&)> question, const std::function<void()>& expect_time);

  std::shared_ptr<State> state_;
};

}  // namespace mlsys::comm
