// What a failure of one rank alone does to its group.
#pragma once

#include <exception>

#include "comm/fault/faults.h"

namespace mlsys::comm {

// Lives as long as an operation that this rank has published. When an exception ends it that is not the
// group's own failure (memory that ran out, say), the others would wait for this rank in vain and its next
// operation would meet the rest of this one: the group is failed, on behalf of this rank, for everyone.
class OperationGuard {
 public:
  // `op` outlives the guard.
  OperationGuard(const Faults& faults, const Descriptor& op, int rank)
      : faults_(faults), op_(op), rank_(rank), num_exceptions_(std::uncaught_exceptions()) {}
  OperationGuard(const OperationGuard&) = delete;
  OperationGuard& operator=(const OperationGuard&) = delete;
  ~OperationGuard() {
    if (std::uncaught_exceptions() > num_exceptions_) [[unlikely]]
      faults_.abandon(rank_, op_);
  }

 private:
  const Faults& faults_;
  const Descriptor& op_;
  int rank_;
  int num_exceptions_;
};

}  // namespace mlsys::comm
