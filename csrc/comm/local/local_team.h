// The ranks of one host, as seen by one of them: publishing operations, waiting for one another, and reaching
// one another's memory. All algorithms inside a host are written against this class.
//
// Every collective begins with arrive() and await_arrival(): each rank publishes its descriptor and waits for
// all others', which is a barrier. Hence, once await_arrival() returns, every local rank has finished the
// operation before this one, and staging buffers are free again. Descriptors and inline payloads are kept
// twice, by parity, because a rank may publish its next operation while a slow one still reads this one.
//
// The two progress counters are for steps inside an operation. All ranks of a host signal each counter the
// same number of times in an operation, so waiting is for "the n-th signal since the operation began".
#pragma once

#include <atomic>
#include <chrono>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "comm/fault/faults.h"
#include "comm/local/control_block.h"
#include "comm/local/store_choice.h"
#include "comm/topology.h"
#include "core/streaming.h"

namespace mlsys::comm {

using Clock = std::chrono::steady_clock;

class LocalTeam {
 public:
  enum Counter { kFirst, kSecond };

  // `arenas` holds each local rank's arena mapped here (this rank's own entry is its own base).
  LocalTeam(const Topology& topology, const ControlBlock& block, const Faults& faults,
            std::vector<std::byte*> arenas, std::vector<size_t> arena_bytes);

  int index() const { return index_; }
  int size() const { return size_; }

  // Puts a contribution beside the descriptor, before arrive(), where the others may read it after
  // await_arrival(): a short one always; a longer one when it is not in the arena and all ranks are on this
  // host, up to eager_limit(). Otherwise does nothing.
  void publish_payload(const Descriptor& descriptor, std::span<const std::byte> payload) const;
  // The contribution of `bytes` that a local rank published so; nullptr when it did not.
  const std::byte* payload(int local, size_t bytes) const;
  size_t eager_limit() const { return eager_limit_; }
  void arrive(const Descriptor& descriptor, Clock::time_point deadline);
  // Waits for all and throws Mismatch when they disagree. Leaves the team poisoned then.
  void await_arrival();

  OpKind last_kind() const { return last_kind_.load(std::memory_order_relaxed); }
  const Descriptor& mine() const { return descriptor(index_); }
  const Descriptor& descriptor(int local) const;
  const std::byte* inline_payload(int local) const { return payload(local, 0); }
  Clock::time_point deadline() const { return deadline_; }

  // Where `bytes` at a published offset of a local rank's arena lie here; nullptr when that rank published
  // none. Throws Mismatch when the range is not inside that arena.
  std::byte* published(int local, uint64_t offset, size_t bytes) const;

  void signal(Counter counter);
  // Waits until `local` has signalled `counter` `n` times in this operation.
  void await(Counter counter, int local, uint32_t n) const;
  void await_all(Counter counter, uint32_t n) const;
  // Whether all have by now, without waiting.
  bool all_signalled(Counter counter, uint32_t n) const;
  void barrier() {
    signal(kFirst);
    await_all(kFirst, signals_[kFirst]);
  }

  // For TileClaims. The set of the operation under way; only valid until the next arrive().
  ClaimSet& claim_set(size_t phase) {
    claimed_ = true;
    return block_.claims(arrivals_ & 1, phase);
  }
  // Whether this rank is in a tile that it has claimed: whom to blame when the work is never complete.
  void set_working(bool working) { block_.slot(index_).working.store(working, std::memory_order_relaxed); }
  // One more tile of `total` is complete.
  void count_done(ClaimSet& set, uint32_t total);
  void await_done(const ClaimSet& set, uint32_t total) const;

  // What moves so many tiles through the rings. Within `body`, copy_out() writes them by the stores that have
  // proved faster for such operations.
  template <class Body>
  void run_staged(size_t num_tiles, Body body) {
    StoreChoice& choice = store_choices_[{last_kind(), num_tiles >= kManyTiles}];
    streams_rings_ = num_tiles >= kFewTiles && choice.streaming();
    const auto begin = Clock::now();
    body();
    if (num_tiles >= kFewTiles) choice.record(num_tiles, Clock::now() - begin);
  }
  void copy_out(void* target, const void* source, size_t bytes) const {
    copy_by(streams_rings_)(target, source, bytes);
  }

  std::byte* stage(int local) const { return block_.stage(local); }
  std::byte* wire_stage(int local) const { return block_.wire_stage(local); }
  std::byte* scratch() const { return block_.scratch(); }

 private:
  SharedCounter& counter_of(Counter counter, int local) const;
  static constexpr int kAnyone = -1;
  // Waits for local rank `local`, or kAnyone, to bring `counter` to `target`.
  void wait_for(const SharedCounter& counter, uint32_t target, int local) const;
  // The group rank that has left in good order among those that are waited for; -1 when none has.
  int first_left(int local) const;
  // In the first operation: measures which stores should write payloads, the same for all ranks. Never
  // changes a result.
  void tune();
  // What is signalled and awaited next counts from here.
  void restart_counters();
  void clear_claims();
  [[noreturn]] void time_out(int local) const;

  const Topology& topology_;
  const ControlBlock& block_;
  const Faults& faults_;
  std::vector<std::byte*> arenas_;
  std::vector<size_t> arena_bytes_;
  int index_;
  int size_;
  int num_spins_;
  int num_yields_;
  size_t eager_limit_;
  bool tuned_ = false;
  bool streams_payloads_ = false;
  static constexpr size_t kFewTiles = 4;    // below, a time says nothing
  static constexpr size_t kManyTiles = 64;  // from here on the tensors are larger than the caches
  std::map<std::pair<OpKind, bool>, StoreChoice> store_choices_;
  bool streams_rings_ = false;
  uint32_t arrivals_ = 0;
  bool claimed_ = false;                          // in the operation under way
  bool stale_claims_ = false;                     // in the one before it
  uint32_t base_[2] = {0, 0};                     // counter values when the operation began
  uint32_t signals_[2] = {0, 0};                  // signals of this rank in the operation
  std::atomic<OpKind> last_kind_{OpKind::kNone};  // read by other threads
  Clock::time_point deadline_;
};

}  // namespace mlsys::comm
