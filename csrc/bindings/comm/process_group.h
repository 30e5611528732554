// The c10d::Backend named "mlsys": what torch.distributed, DDP, FSDP2, DTensor and DCP call.
//
// One object serves all devices. Every virtual asks first whether its tensors are the accelerator's, and then
// passes the call on unchanged to the accelerator's backend (accelerator.h). Else it checks them on the
// caller's thread and hands a body to the membership's executor, which runs the group's collectives one at a
// time in call order. No CPU tensor falls through to another library: what is not overridden here raises with
// its name, as c10d::Backend does.
#pragma once

#include <c10/util/FunctionRef.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <vector>

#include "bindings/comm/bodies.h"
#include "bindings/comm/membership.h"
#include "bindings/comm/record.h"
#include "bindings/comm/where.h"

namespace mlsys::binding {

class ProcessGroupMlsys final : public c10d::Backend {
 public:
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  using TensorLists = std::vector<std::vector<at::Tensor>>;

  explicit ProcessGroupMlsys(std::shared_ptr<Membership> membership);
  ~ProcessGroupMlsys() override;

  const std::string getBackendName() const override { return "mlsys"; }

  // process_group_reduce.cpp
  WorkPtr allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr allreduce_sparse(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr allreduce_coalesced(std::vector<at::Tensor>& tensors,
                              const c10d::AllreduceCoalescedOptions& options) override;
  WorkPtr reduce(std::vector<at::Tensor>& tensors, const c10d::ReduceOptions& options) override;
  WorkPtr reduce_scatter(std::vector<at::Tensor>& outputs, TensorLists& inputs,
                         const c10d::ReduceScatterOptions& options) override;
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override;
  WorkPtr reduce_scatter_tensor_coalesced(std::vector<at::Tensor>& outputs, std::vector<at::Tensor>& inputs,
                                          const c10d::ReduceScatterOptions& options) override;

  // process_group_owned.cpp; no c10d virtuals
  WorkPtr all_reduce_tree(at::Tensor& tensor, const c10d::ReduceOp& op, bool async);
  WorkPtr reduce_scatter_tree(at::Tensor& output, at::Tensor& input, const c10d::ReduceOp& op, bool async);
  WorkPtr all_reduce_compressed(at::Tensor& tensor, const std::string& compression,
                                const std::optional<at::Tensor>& residual, bool average, bool async);

  // process_group_move.cpp
  WorkPtr broadcast(std::vector<at::Tensor>& tensors, const c10d::BroadcastOptions& options) override;
  WorkPtr allgather(TensorLists& outputs, std::vector<at::Tensor>& inputs,
                    const c10d::AllgatherOptions& options) override;
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input,
                          const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_coalesced(TensorLists& outputs, std::vector<at::Tensor>& inputs,
                              const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_into_tensor_coalesced(std::vector<at::Tensor>& outputs, std::vector<at::Tensor>& inputs,
                                          const c10d::AllgatherOptions& options) override;
  WorkPtr gather(TensorLists& outputs, std::vector<at::Tensor>& inputs,
                 const c10d::GatherOptions& options) override;
  WorkPtr scatter(std::vector<at::Tensor>& outputs, TensorLists& inputs,
                  const c10d::ScatterOptions& options) override;
  WorkPtr alltoall(std::vector<at::Tensor>& outputs, std::vector<at::Tensor>& inputs,
                   const c10d::AllToAllOptions& options) override;
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                        std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& options) override;
  WorkPtr barrier(const c10d::BarrierOptions& options) override;
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) override;

  // process_group.cpp
  WorkPtr send(std::vector<at::Tensor>& tensors, int destination, int tag) override;
  WorkPtr recv(std::vector<at::Tensor>& tensors, int source, int tag) override;
  WorkPtr recvAnysource(std::vector<at::Tensor>& tensors, int tag) override;

  // process_group_sharded.cpp: the sharded updates (comm::Communicator says what they do)
  WorkPtr reduce_shard(const at::Tensor& data, std::vector<size_t> partition, const at::Tensor& chunks,
                       const at::Tensor& sums, bool async);
  WorkPtr fused_step(const at::Tensor& gradients, const at::Tensor& parameters, std::vector<size_t> partition,
                     bool is_reduced, OptimizerTable table, bool async);
  WorkPtr share_shards(const at::Tensor& data, std::vector<size_t> partition, bool async);

  bool supportsTensorAlloc(c10::DeviceIndex device) override;
  at::Tensor allocateTensor(long size, at::TensorOptions options) override;

  // process_group_accelerator.cpp
  // Only with an accelerator, whose backend gains by it: without one, batches of messages keep a Work each.
  bool supportsCoalescing() const override { return membership_->accelerator().available(); }
  void startCoalescing() override;
  WorkPtr endCoalescing() override;
  std::shared_ptr<c10::Allocator> getMemAllocator() override;
  c10d::ErrorType getError() override;
  void setGroupUid(const std::string& group_uid) override;
  void setTimeout(std::chrono::milliseconds timeout) override;
  void setSequenceNumberForGroup() override {}  // counts from zero on all ranks: nothing to agree on
  // Collectives issued on this rank, on all devices.
  uint64_t getSequenceNumberForGroup() override;

  // Connects to all other ranks, which call this too; returns when all have. Call without the GIL.
  void connect();
  // Throws PeerFailed when one of these ranks of the job is known to be gone. Call without the GIL.
  void expect_present(const std::vector<int>& global_ranks);
  // Gives operations under way a second to finish; then, and in abort at once, they fail.
  void shutdown() override;
  void abort() override;

  const std::shared_ptr<Membership>& membership() const { return membership_; }

  struct Call {
    c10d::OpType type;
    const char* name;           // as in torch.distributed, for messages
    const char* profile_title;  // as the profiler shows it, "mlsys:all_reduce"
  };
  using Posting = c10::function_ref<std::shared_ptr<comm::Request>(comm::Communicator&)>;
  using Blocking = c10::function_ref<void(comm::Communicator&, std::chrono::milliseconds timeout)>;

  Where where(const char* name) const { return {membership_.get(), name}; }
  // Runs a collective in its turn and returns when it is done, without a Work (process_group_direct.cpp).
  // Throws what Work::wait() would. `timeout` of zero or less means the group's. Releases the GIL if the
  // caller has it.
  void run_now(const Call& call, at::TensorList inputs, at::TensorList outputs,
               std::chrono::milliseconds timeout, Blocking body);
  // The same for one message: posts it and waits. Returns the sender's group rank, for a receive.
  int message_now(const Call& call, const at::Tensor& tensor, int source, int destination, Posting post);

 private:
  // The accelerator's backend, made ready, if that is where the tensors of a call are; null for the CPU's.
  template <class... Tensors>
  c10d::Backend* elsewhere(const Call& call, const Tensors&... tensors) {
    DeviceCount devices{membership_->accelerator().device_type()};
    (devices.look(tensors), ...);
    return devices.on_accelerator == 0 ? nullptr : forward(call, devices);
  }
  // Throws Refused for tensors on several devices, and PeerFailed once the group has failed. Null without an
  // accelerator.
  c10d::Backend* forward(const Call& call, const DeviceCount& devices);
  // A barrier has no tensors: it is the accelerator's when it names, or the group is bound to, its device.
  c10d::Backend* elsewhere_for_barrier(const Call& call, const c10d::BarrierOptions& options);
  c10d::Backend& accelerator_backend();
  // Null unless the accelerator has a way for small tensors and it takes this one.
  WorkPtr small_all_reduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options);
  // Remembers the Work of a CPU operation for endCoalescing(), between startCoalescing() and that.
  WorkPtr keep(WorkPtr work);

  WorkPtr enqueue(const Call& call, const std::vector<at::Tensor>& inputs, std::vector<at::Tensor> outputs,
                  std::chrono::milliseconds timeout, bool async, Body body) {
    return keep(start(call, inputs, std::move(outputs), timeout, async, std::move(body)));
  }
  WorkPtr start(const Call& call, const std::vector<at::Tensor>& inputs, std::vector<at::Tensor> outputs,
                std::chrono::milliseconds timeout, bool async, Body body);
  WorkPtr receive(const Call& call, std::vector<at::Tensor>& tensors, int source, int tag);
  int checked_root(int64_t root, const Where& where) const;

  std::shared_ptr<Membership> membership_;
  std::shared_ptr<const comm::RecordedGroup> recorded_;  // how the recorder names this group
  std::atomic<int64_t> timeout_ms_;
  std::atomic<uint64_t> issued_{0};
  std::atomic<uint64_t> monitored_{0};
  std::atomic<uint64_t> messages_{0};
  std::atomic<std::thread::id> coalescing_{};  // the thread that has called startCoalescing()
  struct Batch {
    bool on_accelerator = false;
    std::vector<WorkPtr> works;
  } batch_;  // of that thread
};

}  // namespace mlsys::binding
