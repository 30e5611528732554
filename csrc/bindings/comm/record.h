// One operation's entry in the recorder, from the call to its end.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <exception>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "comm/recorder/recorder.h"

namespace mlsys::binding {

struct RecordedOperation {
  c10d::OpType type;
  const char* name;
  uint64_t sequence;
  std::chrono::milliseconds timeout;
  int source = -1, destination = -1;  // of a message, group ranks
};

class Record {
 public:
  Record() = default;
  // Records the call, with its Python frames when the recorder wants detail.
  Record(const std::shared_ptr<const comm::RecordedGroup>& group, const RecordedOperation& operation,
         at::TensorList inputs, at::TensorList outputs);

  void started() const;
  void completed() const;
  // Records why it failed. A timeout, a mismatch or a lost peer also dumps the recorder, where a folder for
  // dumps is named.
  void failed(std::exception_ptr failure) const;

  // Where the program called the operation; empty without detail.
  const std::string& call_site() const { return call_site_; }

 private:
  uint64_t id_ = 0;
  std::string call_site_;
};

}  // namespace mlsys::binding
