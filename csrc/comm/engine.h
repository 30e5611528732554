// The Communicator: validates calls, numbers and publishes them, and hands them to the algorithms.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "comm/algorithms/local.h"
#include "comm/bringup/links.h"
#include "comm/communicator.h"
#include "comm/p2p/messenger.h"

namespace mlsys::comm {

class Engine final : public Communicator {
 public:
  Engine(std::shared_ptr<Store> store, Options options);
  ~Engine() override;

  void all_reduce(void* data, size_t count, Reduction reduction, Timeout timeout) override;
  void reduce(void* data, size_t count, Reduction reduction, int root, Timeout timeout) override;
  void all_gather(const void* input, std::span<void* const> outputs, size_t bytes, Timeout timeout) override;
  void reduce_scatter(std::span<const void* const> inputs, void* output, size_t count, Reduction reduction,
                      Timeout timeout) override;
  void all_reduce_tree(void* data, size_t count, Reduction reduction, Timeout timeout) override;
  void reduce_scatter_tree(std::span<const void* const> inputs, void* output, size_t count,
                           Reduction reduction, Timeout timeout) override;
  void all_reduce_compressed(float* data, size_t count, bool average, Compression compression,
                             float* residual, Timeout timeout) override;
  void broadcast(void* data, size_t bytes, int root, Timeout timeout) override;
  void gather(const void* input, std::span<void* const> outputs, size_t bytes, int root,
              Timeout timeout) override;
  void scatter(std::span<const void* const> inputs, void* output, size_t bytes, int root,
               Timeout timeout) override;
  void all_to_all(std::span<const void* const> inputs, std::span<const size_t> send_bytes,
                  std::span<void* const> outputs, std::span<const size_t> recv_bytes,
                  Timeout timeout) override;
  void barrier(Timeout timeout) override;
  void connect(Timeout timeout) override;
  void reduce_shard(void* data, size_t count, Reduction reduction, Partition partition, const OnTile& on_tile,
                    Timeout timeout) override;
  void reduce_scatter_optimize_all_gather(const void* gradients, void* parameters, size_t count,
                                          Reduction reduction, Partition partition, bool is_reduced,
                                          const OnTile& update, Timeout timeout) override;

  std::shared_ptr<Request> send(const void* data, size_t bytes, int destination, uint64_t tag) override;
  std::shared_ptr<Request> recv(void* data, size_t bytes, int source, uint64_t tag) override;

  std::shared_ptr<void> allocate(size_t bytes) override;
  bool in_arena(const void* data, size_t bytes) const override;

  int rank() const override { return options_.rank; }
  int size() const override { return options_.size; }
  int num_hosts() const override;
  uint64_t sequence() const override { return sequence_.load(std::memory_order_relaxed); }
  Counters counters() const override;
  std::string describe_transports() const override;
  void expect_healthy() const override;
  void expect_present(std::span<const int> global_ranks) const override;
  int first_stopped(std::span<const int> global_ranks) const override;
  void on_failure(std::function<void()> callback) override;
  std::vector<int> present() const override;
  bool has_left(int rank) const override;
  void post_notice(const std::string& text) override;
  std::string notice(int rank) const override;
  void poison(const std::string& cause) override;
  void shutdown() override;

 private:
  // What a call publishes, without its number.
  Descriptor new_call(OpKind kind, size_t count, int root) const;
  Descriptor new_reduction(OpKind kind, size_t count, int root, const Reduction& reduction) const;
  // Meets all ranks without moving data: connect() and barrier().
  void meet(OpKind kind, Timeout timeout);
  // Connects if need be, numbers and publishes the call together with `payload` (this rank's contribution,
  // which travels beside the descriptor when it is short: see LocalTeam::publish_payload), opens connections,
  // and waits until all ranks of this host agree about the call.
  Context begin(Descriptor call, Timeout timeout, std::span<const std::byte> payload);
  // For a reduction of one tensor to all ranks, and for one of `inputs`, one for each rank.
  Context begin_reduction(OpKind kind, const void* data, size_t count, const Reduction& reduction,
                          Timeout timeout);
  Context begin_scatter(OpKind kind, std::span<const void* const> inputs, size_t count,
                        const Reduction& reduction, Timeout timeout);
  static void expect_entries(size_t given, int expected, const char* what);
  // Call at the end of an operation over several hosts: what was posted has moved, the calls are compared.
  static void end(Context& context) { context.mesh->finish(); }
  void begin_alone();
  // What this rank sends to the ranks of its host; `piece_for` a group rank.
  std::vector<ExchangeEntry> exchange_entries(
      const std::function<std::span<const std::byte>(int)>& piece_for);
  // The sharded updates inside one host with all buffers in the arena; false when that is not the case.
  bool reduce_shard_directly(void* data, size_t count, const Reduction& reduction, Partition partition,
                             const OnTile& on_tile, Timeout timeout);
  bool optimize_directly(const void* gradients, void* parameters, size_t count, const Reduction& reduction,
                         Partition partition, bool is_reduced, const OnTile& update, Timeout timeout);
  Links& links();
  // Calls what on_failure() was given, unless that happened before.
  void tell_of_failure();
  // Null once shut down.
  Messenger* messenger();
  // Offset in this process's arena, or Descriptor::kNoOffset.
  uint64_t offset_of(const void* data, size_t bytes) const;
  std::shared_ptr<Arena> arena();
  void check_rank(int rank, const char* what) const;
  void expect_open() const;
  // True in a child forked after connecting: the links belong to its parent.
  bool is_forked_child() const;

  const Options options_;
  const std::shared_ptr<Store> store_;
  mutable std::mutex arena_mutex_;
  std::shared_ptr<Arena> arena_;  // of the process, from the first allocation or operation on
  std::mutex connecting_;         // held while links_ is built
  std::unique_ptr<Links> links_;
  std::exception_ptr connect_failure_;      // a group that failed to connect stays failed
  std::atomic<Links*> connected_{nullptr};  // links_ once it is complete
  std::atomic<pid_t> owner_{0};             // the process that connected
  std::atomic<bool> shut_down_{false};
  std::mutex running_;            // held by a collective, so that shutdown() closes nothing under it
  mutable std::mutex messaging_;  // guards messenger_
  std::unique_ptr<Messenger> messenger_;
  std::mutex telling_;  // guards on_failure_
  std::function<void()> on_failure_;
  std::atomic<uint64_t> sequence_{0};
  LiveCounters live_;
};

}  // namespace mlsys::comm
