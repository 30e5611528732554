#include "comm/fault/faults.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "comm/local/futex.h"

namespace mlsys::comm {
namespace {

constexpr std::chrono::milliseconds kGrace{300};

template <size_t kBytes>
void copy_text(char (&target)[kBytes], const std::string& text) {
  const size_t length = std::min(text.size(), kBytes - 1);
  std::memcpy(target, text.data(), length);
  target[length] = '\0';
}

template <size_t kBytes>
std::string text_of(const char (&source)[kBytes]) {
  return std::string(source, ::strnlen(source, kBytes));
}

}  // namespace

UniqueFd make_eventfd() {
  UniqueFd fd(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!fd) throw_errno("eventfd");
  return fd;
}

void raise_eventfd(int fd) {
  const uint64_t one = 1;
  // EAGAIN means the counter is at its maximum: the reader is woken all the same.
  if (::write(fd, &one, sizeof(one)) < 0 && errno != EAGAIN && errno != EINTR)
    throw_errno("write to an eventfd");
}

void drain_eventfd(int fd) {
  uint64_t value = 0;
  if (::read(fd, &value, sizeof(value)) < 0 && errno != EAGAIN && errno != EINTR) {
    throw_errno("read of an eventfd");
  }
}

Faults::Faults(const Topology& topology, const ControlBlock& block, std::vector<UniqueFd> doorbells)
    : topology_(topology), block_(block), doorbells_(std::move(doorbells)), abort_(make_eventfd()) {}

void Faults::throw_poison() const {
  if (!poisoned()) throw std::runtime_error("the group was shut down on this rank.");
  const Poison p = record();
  if (p.kind == PoisonKind::kMismatch) throw Mismatch(p.cause);
  throw PeerFailed(p.rank, p.host, p.pid, p.cause, p.op, p.sequence);
}

void Faults::close() const {
  closing_.store(true, std::memory_order_seq_cst);
  raise_abort();
}

Poison Faults::record() const {
  const PoisonRecord& r = block_.poison();
  return {r.kind, r.rank, r.pid, r.sequence, text_of(r.host), text_of(r.op), text_of(r.cause)};
}

void Faults::poison(const Poison& poison) const {
  PoisonRecord& r = block_.poison();
  uint32_t empty = 0;
  if (r.state.compare_exchange_strong(empty, 1, std::memory_order_acq_rel)) {
    r.kind = poison.kind;
    r.rank = poison.rank;
    r.pid = poison.pid;
    r.sequence = poison.sequence;
    copy_text(r.host, poison.host);
    copy_text(r.op, poison.op);
    copy_text(r.cause, poison.cause);
    r.state.store(2, std::memory_order_seq_cst);
  }
  wake_futexes();
  ring_doorbells();
  raise_abort();
}

void Faults::poison_peer(int culprit, const std::string& cause, const Descriptor& op) const {
  const Member& member = topology_.members[culprit];
  poison({PoisonKind::kPeerFailed, member.global_rank, member.pid, op.sequence, member.host, name_of(op.kind),
          cause});
}

void Faults::fail_mismatch(const std::string& text, const Descriptor& op) const {
  poison({PoisonKind::kMismatch, op.rank, 0, op.sequence, "", name_of(op.kind), text});
  throw_poison();
}

void Faults::fail_left(int culprit, const Descriptor& op) const {
  check();
  poison_peer(culprit, "left the group", op);
  throw_poison();
}

void Faults::mark_left(int rank) const {
  block_.left(rank).store(1, std::memory_order_seq_cst);
  wake_futexes();
  ring_doorbells();
}

void Faults::lost(int culprit, const std::string& cause, const Descriptor& op) const {
  pollfd waiting{abort_.get(), POLLIN, 0};
  const auto deadline = std::chrono::steady_clock::now() + kGrace;
  while (!poisoned() && !has_left(culprit)) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) break;
    (void)::poll(&waiting, 1, static_cast<int>(std::min<int64_t>(left.count(), 10)));
  }
  check();
  poison_peer(culprit, has_left(culprit) ? "left the group" : cause, op);
  throw_poison();
}

void Faults::raise_abort() const { raise_eventfd(abort_.get()); }

void Faults::ring_doorbells() const {
  for (const UniqueFd& doorbell : doorbells_) raise_eventfd(doorbell.get());
}

void Faults::wake_futexes() const {
  for (int local = 0; local < block_.local_size(); ++local) {
    RankSlot& slot = block_.slot(local);
    for (SharedCounter* counter : {&slot.arrived, &slot.first, &slot.second}) futex_wake_all(counter->value);
  }
}

}  // namespace mlsys::comm
