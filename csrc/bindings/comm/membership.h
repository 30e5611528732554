// This rank's membership in one group: the communicator, the order of its operations, and how both end.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <string>

#include "bindings/comm/executor.h"
#include "bindings/comm/interruptible_store.h"
#include "comm/communicator.h"

namespace mlsys::binding {

class Membership {
 public:
  Membership(std::shared_ptr<InterruptibleStore> store, comm::Options options);
  Membership(const Membership&) = delete;
  Membership& operator=(const Membership&) = delete;
  ~Membership();

  comm::Communicator& communicator() { return *communicator_; }
  Executor& executor() { return executor_; }
  const comm::Options& options() const { return options_; }
  int global_rank() const { return global_rank_of(options_.rank); }
  int global_rank_of(int group_rank) const;

  // Ends the membership; idempotent, and safe from any thread and at interpreter exit. Operations under way
  // get `grace` to finish. What is left then fails here, and the peers are told that this rank left in the
  // middle.
  void leave(std::chrono::milliseconds grace);

 private:
  const comm::Options options_;
  std::shared_ptr<InterruptibleStore> store_;
  std::shared_ptr<comm::Communicator> communicator_;
  Executor executor_;
  std::mutex leaving_;
  bool left_ = false;
};

}  // namespace mlsys::binding
