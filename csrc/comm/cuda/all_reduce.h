// An all-reduce between the GPUs of one host through memory that they map of each other (CUDA IPC), for small
// messages. No CUDA headers here: streams are void*.
//
// Contract. fp32, fp16 and bf16, SUM and AVG, in place, at most `most_bytes`, any alignment of the element.
// The same calls in the same order on all ranks, by one thread at a time; a call on another stream than the
// one before waits for that. Calls return when the kernel is queued. They may be captured in a graph, whose
// replays the caller orders with other calls. Bits: see steps.h. All ranks call share() and open() before the
// first all_reduce; a device without access to a peer's memory throws there.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace mlsys::comm::cuda {

class IpcAllReduce {
 public:
  // Allocates on `device`, as this process counts. Throws std::invalid_argument for sizes other than 2 to 8,
  // std::runtime_error with CUDA's words.
  IpcAllReduce(int device, int rank, int size, size_t most_bytes, std::chrono::milliseconds timeout);
  IpcAllReduce(const IpcAllReduce&) = delete;
  IpcAllReduce& operator=(const IpcAllReduce&) = delete;
  // Waits for the device. The memory that peers have mapped is kept until the process ends.
  ~IpcAllReduce();

  // What peers need to map this rank's memory.
  std::vector<uint8_t> share() const;
  // `handles` has every rank's share(), in rank order.
  void open(const std::vector<std::vector<uint8_t>>& handles);

  static bool takes(ElementType dtype, ReduceOp op);
  size_t most_bytes() const;
  // Throws std::invalid_argument for what takes() and most_bytes() exclude.
  void all_reduce(void* data, size_t count, ElementType dtype, ReduceOp op, void* stream);

  // Ends waits on the device, now and later. From any thread.
  void stop();
  // Why a kernel gave up, in words, and empty when none did. Complete once the stream is.
  std::string failure() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace mlsys::comm::cuda
