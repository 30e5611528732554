// The fault state of one communicator: the poison record, who has left or died, and the descriptors that wake
// sleepers.
//
// The first failure that a host learns of is written once into the control block's poison record; everything
// that waits there polls it. Ranks are woken in three ways: futex sleepers by a wake on every counter, the
// watch thread of each local rank by its doorbell, and whoever sits in poll() by the abort descriptor, which
// the watch thread (or whoever wrote the record in this process) raises and nobody ever lowers.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "comm/fault/inquest.h"
#include "comm/local/control_block.h"
#include "comm/operation.h"
#include "comm/topology.h"
#include "memory/posix.h"

namespace mlsys::comm {

struct Poison {
  PoisonKind kind = PoisonKind::kPeerFailed;
  int rank = -1;  // global
  int64_t pid = 0;
  uint64_t sequence = 0;
  std::string host;
  std::string op;
  std::string cause;
};

class Faults {
 public:
  // Finds out what every rank of the group is doing, with little patience; one entry for each rank.
  using Inquiry = std::function<std::vector<Standing>()>;

  // `doorbells` has one eventfd per local rank, this rank's own among them.
  Faults(const Topology& topology, const ControlBlock& block, std::vector<UniqueFd> doorbells);

  bool poisoned() const { return block_.poison().state.load(std::memory_order_acquire) == 2; }
  // Throws when the group is poisoned, or this rank is shutting down.
  void check() const {
    if (poisoned() || closing_.load(std::memory_order_acquire)) [[unlikely]]
      throw_poison();
  }
  // Ends the waits of this process alone.
  void close() const;
  [[noreturn]] void throw_poison() const;
  Poison record() const;

  // Writes the record unless there is one already, and wakes everything on this host.
  void poison(const Poison& poison) const;
  // The same with group rank `culprit`, whose host and pid come from the topology.
  void poison_peer(int culprit, const std::string& cause, const Descriptor& op) const;
  Poison failure_of(int culprit, const std::string& cause, const Descriptor& op) const;
  // Poisons with a mismatch and throws it.
  [[noreturn]] void fail_mismatch(const std::string& text, const Descriptor& op) const;
  // `culprit` has left in good order but is still needed.
  [[noreturn]] void fail_left(int culprit, const Descriptor& op) const;
  // `culprit` is certainly dead.
  [[noreturn]] void fail_dead(int culprit, const std::string& cause, const Descriptor& op) const;
  // `op` outlived its timeout waiting for `awaited`: finds out whom to blame, tells the whole group, which is
  // given up for all, and throws TimedOut.
  [[noreturn]] void give_up(std::span<const int> awaited, const Descriptor& op) const;
  // A message from or to group rank `peer` (-1: any) is late, as `what` says: throws TimedOut with what every
  // rank is doing. Only when one of them is stopped or unreachable is the group given up for all.
  [[noreturn]] void give_up_message(int peer, const std::string& what) const;
  // What every rank is doing; nothing while the group connects.
  std::vector<Standing> inquire() const;
  // The watch thread's side of these; null takes it away.
  void attach(Inquiry inquiry) const;

  // An exception ended `op` on group rank `rank`, which is this one. Does nothing when that was the group's
  // failure, or this rank is shutting down.
  void abandon(int rank, const Descriptor& op) const;

  bool has_left(int rank) const { return presence(rank) == kLeft; }
  Presence presence(int rank) const {
    return static_cast<Presence>(block_.presence(rank).load(std::memory_order_acquire));
  }
  // The first mark stays: who left in good order does not die any more.
  void mark(int rank, Presence presence) const;

  // What survivors tell one another after a failure; at most Notice::kBytes - 1 characters.
  void post_notice(int rank, const std::string& text) const;
  std::string notice(int rank) const;

  // Something went away without a word. Gives the watch threads a moment to name the root cause, then blames
  // `culprit`. Throws always.
  [[noreturn]] void lost(int culprit, const std::string& cause, const Descriptor& op) const;

  int abort_fd() const { return abort_.get(); }
  int doorbell_fd() const { return doorbells_[topology_.local_index()].get(); }
  void raise_abort() const;
  void ring_doorbells() const;
  void wake_futexes() const;

 private:
  const Topology& topology_;
  const ControlBlock& block_;
  std::vector<UniqueFd> doorbells_;
  UniqueFd abort_;
  mutable std::atomic<bool> closing_{false};
  mutable std::mutex inquiry_mutex_;
  mutable Inquiry inquiry_;
};

UniqueFd make_eventfd();
void raise_eventfd(int fd);
void drain_eventfd(int fd);

}  // namespace mlsys::comm
