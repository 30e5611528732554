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
  // Publishes why this rank gives up and throws it, unless somebody was first: then that is thrown. The store
  // may be gone as well.
  [[noreturn]] void give_up(const Poison& mine);

 private:
  std::optional<std::vector<uint8_t>> look_up(const std::string& key);
  // Learns of one more rank that has come already, so that its death is noticed while another one is awaited.
  void watch_another();
  void heed_job();
  void throw_first_failure();
  [[noreturn]] void store_is_gone(int dead);

  std::shared_ptr<Store> store_;
  const Options& options_;
  const Identity& mine_;
  Liveness& liveness_;
  std::function<bool()> stop_;
  std::string prefix_;
  std::vector<int> members_;  // global ranks
  int next_ = 0;              // to be asked about in watch_another()
  std::chrono::steady_clock::time_point deadline_;
  std::chrono::steady_clock::time_point asked_at_ = std::chrono::steady_clock::now();
};

}  // namespace mlsys::comm
