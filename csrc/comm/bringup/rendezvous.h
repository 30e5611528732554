// The store with one group's key prefix, as the ranks use it while they connect.
//
// Waiting is done in short looks, so that deaths and `stop` are noticed at once and other users of the store
// get their turn. The first rank that fails writes why under "failed", before its own end can be taken for
// the cause; the others then tell the same.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/bringup/identity.h"
#include "comm/bringup/liveness.h"
#include "comm/bringup/store_clerk.h"
#include "comm/communicator.h"
#include "comm/fault/faults.h"

namespace mlsys::comm {

class Rendezvous {
 public:
  // `mine` tells which ranks can be watched, `liveness` learns of them.
  Rendezvous(std::shared_ptr<Store> store, const Options& options, const Identity& mine, Liveness& liveness,
             std::function<bool()> stop);

  void put(const std::string& kind, int rank, const std::vector<uint8_t>& value);
  // Throws PeerFailed when the key is missing and `rank` is dead; or, when `needs_all`, any watched rank is:
  // `needs_all` says that no rank can leave this stage before all have published their key of this kind.
  // `meanwhile` is called before each look.
  std::vector<uint8_t> get(const std::string& kind, int rank, bool needs_all,
                           const std::function<void()>& meanwhile = nullptr);

  int global_rank(int rank) const;

  // Throws what another rank has published with give_up(), asking the store only now and then, and what the
  // job's group knows about the members.
  void heed_failures();
  // Publishes why this rank gives up, unless somebody was first, and returns what is published. A store that
  // does not answer is told when it does.
  Poison agree_on(const Poison& mine);
  // Throws it, in the words for this rank.
  [[noreturn]] void raise(const Poison& poison) const;
  [[noreturn]] void give_up(const Poison& mine) { raise(agree_on(mine)); }
  // Gives up because the timeout has passed: because of a rank that is stopped, where one can be found, else
  // of group rank `awaited` (-1: unknown), which `what`, the end of a sentence about it.
  [[noreturn]] void time_out(int awaited, const std::string& what);
  // The global rank of a member whose process is stopped, or -1.
  int first_stopped() const;
  // Something broke on this rank. It most often follows a death, or a failure that another rank is about to
  // publish: throws that, or publishes `error` as this rank's own failure and returns.
  void explain(const std::exception& error);

 private:
  std::optional<std::vector<uint8_t>> look_up(const std::string& key);
  // Learns of one more rank that has come already, so that its death is noticed while another one is awaited.
  void watch_another();
  void heed_job();
  void notice_stall();
  // Called while the store has not answered yet: throws when it will not do so in time.
  void expect_answer();
  void throw_first_failure(std::chrono::milliseconds patience);
  [[noreturn]] void store_is_gone(int dead);

  StoreClerk clerk_;
  std::optional<Poison> agreed_;  // why this rank gives up
  const Options& options_;
  const Identity& mine_;
  Liveness& liveness_;
  std::function<bool()> stop_;
  std::string prefix_;
  std::vector<int> members_;  // global ranks
  int next_ = 0;              // to be asked about in watch_another()
  std::chrono::steady_clock::time_point deadline_;
  std::chrono::steady_clock::time_point ran_at_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point listens_until_{};  // after it did not run for a while
  std::chrono::steady_clock::time_point asked_at_ = std::chrono::steady_clock::now();
};

}  // namespace mlsys::comm
