// This rank's membership in one group: the communicator, the order of its operations, and how both end.
#pragma once

#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <string>

#include "bindings/comm/accelerator.h"
#include "bindings/comm/executor.h"
#include "bindings/comm/failures.h"
#include "bindings/comm/interruptible_store.h"
#include "bindings/comm/record.h"
#include "comm/communicator.h"

namespace mlsys::binding {

class Membership {
 public:
  Membership(std::shared_ptr<InterruptibleStore> store, comm::Options options,
             c10::DeviceType accelerator_type, Accelerator::Maker make_accelerator,
             Accelerator::SmallMaker make_small);
  Membership(const Membership&) = delete;
  Membership& operator=(const Membership&) = delete;
  ~Membership();

  comm::Communicator& communicator() { return *communicator_; }
  std::shared_ptr<const comm::Communicator> shared_communicator() const { return communicator_; }
  Executor& executor() { return executor_; }
  Accelerator& accelerator() { return accelerator_; }
  const comm::Options& options() const { return options_; }
  int global_rank() const { return global_rank_of(options_.rank); }
  int global_rank_of(int group_rank) const;

  // What Python is told of an operation's end, null if it succeeded; the recorder is told first.
  std::exception_ptr told(std::exception_ptr failure, const Place& place, const Record& record);

  // Ends the membership; idempotent, and safe from any thread and at interpreter exit, but not with the GIL.
  // Operations under way get `grace` to finish. What is left then fails here, and the peers are told that
  // this rank left in the middle. The accelerator's backend is shut down, or aborted when there is no grace.
  void leave(std::chrono::milliseconds grace);

 private:
  // A mismatch with the places in the program where each rank made the call, of those that tell theirs within
  // a second; any other failure, and one of ranks that record no call sites, as it is.
  std::exception_ptr with_call_sites(std::exception_ptr failure, uint64_t sequence,
                                     const std::string& own_site);

  const comm::Options options_;
  std::shared_ptr<InterruptibleStore> store_;
  std::shared_ptr<comm::Communicator> communicator_;
  Accelerator accelerator_;
  Executor executor_;
  std::mutex leaving_;
  bool left_ = false;
};

}  // namespace mlsys::binding
