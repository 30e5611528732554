#include "comm/fault/faults.h"

#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
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
  if (p.kind == PoisonKind::kTimedOut) {
    const bool mine = p.rank == topology_.global(topology_.rank);
    throw TimedOut(mine ? "this rank is out of the group, which gave it up: " + p.cause : p.cause);
  }
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

Poison Faults::failure_of(int culprit, const std::string& cause, const Descriptor& op) const {
  const Member& member = topology_.members[culprit];
  return {PoisonKind::kPeerFailed,
          member.global_rank,
          member.pid,
          op.sequence,
          member.host,
          name_of(op.kind),
          cause};
}

void Faults::poison_peer(int culprit, const std::string& cause, const Descriptor& op) const {
  poison(failure_of(culprit, cause, op));
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

void Faults::fail_dead(int culprit, const std::string& cause, const Descriptor& op) const {
  check();
  poison_peer(culprit, cause, op);
  throw_poison();
}

// Empty while the group connects: there is no watch thread yet. The mutex is held meanwhile, so that the
// watch thread outlives the question.
std::vector<Standing> Faults::inquire() const {
  const std::lock_guard lock(inquiry_mutex_);
  return inquiry_ ? inquiry_() : std::vector<Standing>();
}

void Faults::give_up(std::span<const int> awaited, const Descriptor& op) const {
  const std::vector<Standing> standings = inquire();
  check();  // somebody else may have been quicker
  const Verdict verdict = judge(topology_, standings, awaited, op);
  const int culprit = verdict.culprit < 0 ? -1 : topology_.global(verdict.culprit);
  const std::string text = "rank " + std::to_string(op.rank) + " timed out in " + describe(op) +
                           " waiting for rank " + std::to_string(culprit) + "." + verdict.findings;
  poison({PoisonKind::kTimedOut, culprit, 0, op.sequence, "", name_of(op.kind), text});
  throw_poison();
}

void Faults::give_up_message(int peer, const std::string& what) const {
  const std::vector<Standing> standings = inquire();
  check();
  const std::array awaited{peer};
  const Verdict verdict = judge(
      topology_, standings, peer < 0 ? std::span<const int>() : std::span<const int>(awaited), Descriptor{});
  if (!verdict.unreachable) throw TimedOut(what + verdict.findings);
  poison({PoisonKind::kTimedOut, topology_.global(verdict.culprit), 0, 0, "", "send or recv",
          what + verdict.findings});
  throw_poison();
}

void Faults::abandon(int rank, const Descriptor& op) const {
  if (closing_.load(std::memory_order_acquire)) return;
  poison_peer(rank, "an exception ended its operation", op);
}

void Faults::attach(Inquiry inquiry) const {
  const std::lock_guard lock(inquiry_mutex_);
  inquiry_ = std::move(inquiry);
}

void Faults::mark(int rank, Presence presence) const {
  uint32_t present = kPresent;
  if (!block_.presence(rank).compare_exchange_strong(present, presence, std::memory_order_seq_cst)) return;
  wake_futexes();
  ring_doorbells();
}

void Faults::post_notice(int rank, const std::string& text) const {
  Notice& notice = block_.notice(rank);
  const uint32_t version = notice.version.load(std::memory_order_acquire) & ~1U;
  notice.version.store(version + 1, std::memory_order_seq_cst);
  for (size_t i = 0; i < Notice::kBytes; ++i) {
    const char letter = i < text.size() && i + 1 < Notice::kBytes ? text[i] : '\0';
    std::atomic_ref(notice.text[i]).store(letter, std::memory_order_relaxed);
  }
  notice.version.store(version + 2, std::memory_order_seq_cst);
  ring_doorbells();
}

std::string Faults::notice(int rank) const {
  Notice& notice = block_.notice(rank);
  for (int tries = 0; tries < 100; ++tries) {
    const uint32_t before = notice.version.load(std::memory_order_seq_cst);
    std::string text;
    for (char& letter : notice.text) {
      const char seen = std::atomic_ref(letter).load(std::memory_order_relaxed);
      if (seen == '\0') break;
      text += seen;
    }
    if (before % 2 == 0 && notice.version.load(std::memory_order_seq_cst) == before) return text;
    ::sched_yield();
  }
  return "";  // its writer died while writing
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
  for (uint32_t parity = 0; parity < 2; ++parity) {
    for (size_t phase = 0; phase < ControlBlock::kClaimPhases; ++phase) {
      futex_wake_all(block_.claims(parity, phase).done.value);
    }
  }
}

}  // namespace mlsys::comm
