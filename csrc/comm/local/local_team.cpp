#include "comm/local/local_team.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <utility>

#include "comm/local/futex.h"

namespace mlsys::comm {
namespace {

// A futex sleep is bounded so that a wake-up lost with a killed process costs no more than this.
constexpr std::chrono::milliseconds kLongestSleep{50};

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline bool reached(uint32_t value, uint32_t target) { return static_cast<int32_t>(value - target) >= 0; }

template <class Body>
int64_t timed_ns(Body body) {
  const auto begin = Clock::now();
  body();
  return std::chrono::nanoseconds(Clock::now() - begin).count();
}

// Keeps the calling thread on the first, or the last, of the cores that it may use. Two ranks that share a
// core, as they do now and then when there are more ranks than cores, would measure nothing but its cache.
class OnOneCore {
 public:
  explicit OnOneCore(bool first) {
    CPU_ZERO(&before_);
    if (::sched_getaffinity(0, sizeof(before_), &before_) != 0) return;  // more cores than the set holds
    int chosen = -1;
    for (int core = 0; core < CPU_SETSIZE; ++core) {
      if (CPU_ISSET(core, &before_) && (chosen < 0 || !first)) chosen = core;
    }
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(chosen, &one);
    moved_ = ::sched_setaffinity(0, sizeof(one), &one) == 0;
  }
  OnOneCore(const OnOneCore&) = delete;
  OnOneCore& operator=(const OnOneCore&) = delete;
  ~OnOneCore() {
    if (moved_) ::sched_setaffinity(0, sizeof(before_), &before_);
  }

 private:
  cpu_set_t before_;
  bool moved_ = false;
};

// A contribution that all read whole must not be so long that reading one share of it and exchanging results
// would be faster: everybody reads at most kMostEagerReads.
constexpr size_t kMostEagerReads = 512 << 10;

size_t eager_limit_of(const Topology& topology) {
  if (topology.num_hosts() > 1 || topology.local_size() < 2) return 0;
  return std::min(ControlBlock::kEagerBytes,
                  kMostEagerReads / static_cast<size_t>(topology.local_size() - 1));
}

}  // namespace

LocalTeam::LocalTeam(const Topology& topology, const ControlBlock& block, const Faults& faults,
                     std::vector<std::byte*> arenas, std::vector<size_t> arena_bytes)
    : topology_(topology),
      block_(block),
      faults_(faults),
      arenas_(std::move(arenas)),
      arena_bytes_(std::move(arena_bytes)),
      index_(topology.local_index()),
      size_(topology.local_size()),
      eager_limit_(eager_limit_of(topology)) {
  // With a core for every rank, spinning is the fastest; with fewer, it keeps the awaited rank from running.
  const long cores = ::sysconf(_SC_NPROCESSORS_ONLN);
  const bool crowded = cores < size_;
  num_spins_ = crowded ? 20 : 2000;
  num_yields_ = crowded ? 4 : 100;
}

void LocalTeam::publish_payload(const Descriptor& descriptor, std::span<const std::byte> payload) const {
  const uint32_t parity = (arrivals_ + 1) & 1;
  if (payload.empty()) return;
  if (payload.size() <= RankSlot::kInlineBytes) {
    std::memcpy(block_.slot(index_).inline_payload[parity], payload.data(), payload.size());
  } else if (payload.size() <= eager_limit_ && descriptor.arena_offset == Descriptor::kNoOffset) {
    copy_by(streams_payloads_)(block_.eager(index_, parity), payload.data(), payload.size());
  }
}

void LocalTeam::arrive(const Descriptor& descriptor, Clock::time_point deadline) {
  deadline_ = deadline;
  last_kind_.store(descriptor.kind, std::memory_order_relaxed);
  restart_counters();
  stale_claims_ = std::exchange(claimed_, false);
  ++arrivals_;
  RankSlot& slot = block_.slot(index_);
  slot.descriptors[arrivals_ & 1] = descriptor;
  slot.arrived.value.store(arrivals_, std::memory_order_seq_cst);
  if (slot.arrived.num_sleepers.load(std::memory_order_seq_cst) != 0) futex_wake_all(slot.arrived.value);
}

void LocalTeam::await_arrival() {
  for (int local = 0; local < size_; ++local) {
    if (local != index_) wait_for(block_.slot(local).arrived, arrivals_, local);
  }
  for (int local = 0; local < size_; ++local) {
    if (!same_operation(mine(), descriptor(local))) {
      faults_.fail_mismatch(describe_mismatch(mine(), descriptor(local)), mine());
    }
  }
  if (stale_claims_ && index_ == 0) clear_claims();
  if (!tuned_) tune();
}

// Payloads are written over those of two operations before, while the readers' caches still hold them. Rank 0
// writes with either kind of store in turn what rank 1 then reads, and the rest look on. The verdict of rank
// 0, by the medians of both times together, is everybody's.
void LocalTeam::tune() {
  constexpr size_t kRounds = 15;
  tuned_ = true;
  if (size_ < 2) return;
  std::optional<OnOneCore> apart;
  if (index_ < 2) apart.emplace(index_ == 0);
  std::vector<std::byte> own(64 << 10);
  std::array<std::array<int64_t, kRounds>, 2> spent_ns{};
  for (size_t round = 0; round < 2 * kRounds; ++round) {
    const bool streaming = round % 2 != 0;
    int64_t& sum = spent_ns[streaming][round / 2];
    if (index_ == 0) sum = timed_ns([&] { copy_by(streaming)(stage(0), own.data(), own.size()); });
    barrier();
    if (index_ == 1) {
      block_.tuning().read_ns.store(timed_ns([&] { std::memcpy(own.data(), stage(0), own.size()); }),
                                    std::memory_order_relaxed);
    }
    barrier();
    if (index_ == 0) sum += block_.tuning().read_ns.load(std::memory_order_relaxed);
  }
  if (index_ == 0) {
    for (auto& times : spent_ns) std::sort(times.begin(), times.end());
    block_.tuning().streams.store(spent_ns[1][kRounds / 2] < spent_ns[0][kRounds / 2],
                                  std::memory_order_relaxed);
  }
  barrier();
  streams_payloads_ = block_.tuning().streams.load(std::memory_order_relaxed) != 0;
  restart_counters();  // the operation itself counts from here
}

void LocalTeam::restart_counters() {
  for (Counter counter : {kFirst, kSecond}) {
    base_[counter] += signals_[counter];
    signals_[counter] = 0;
  }
}

// All have finished the operation before this one, and its claims are used again by the one after this one,
// which begins when this rank, too, has arrived there.
void LocalTeam::clear_claims() {
  for (size_t phase = 0; phase < ControlBlock::kClaimPhases; ++phase) {
    ClaimSet& set = block_.claims((arrivals_ + 1) & 1, phase);
    set.next.store(0, std::memory_order_relaxed);
    set.done.value.store(0, std::memory_order_relaxed);
  }
}

const Descriptor& LocalTeam::descriptor(int local) const {
  return block_.slot(local).descriptors[arrivals_ & 1];
}

const std::byte* LocalTeam::payload(int local, size_t bytes) const {
  const uint32_t parity = arrivals_ & 1;
  if (bytes <= RankSlot::kInlineBytes) return block_.slot(local).inline_payload[parity];
  const bool published = bytes <= eager_limit_ && descriptor(local).arena_offset == Descriptor::kNoOffset;
  return published ? block_.eager(local, parity) : nullptr;
}

std::byte* LocalTeam::published(int local, uint64_t offset, size_t bytes) const {
  if (offset == Descriptor::kNoOffset) return nullptr;
  if (bytes > arena_bytes_[local] || offset > arena_bytes_[local] - bytes) {
    faults_.fail_mismatch("rank " + std::to_string(descriptor(local).rank) + " published offset " +
                              std::to_string(offset) + " of its arena for " + std::to_string(bytes) +
                              " bytes, but the arena has " + std::to_string(arena_bytes_[local]) + " bytes.",
                          mine());
  }
  return arenas_[local] + offset;
}

SharedCounter& LocalTeam::counter_of(Counter counter, int local) const {
  RankSlot& slot = block_.slot(local);
  return counter == kFirst ? slot.first : slot.second;
}

void LocalTeam::signal(Counter counter) {
  SharedCounter& shared = counter_of(counter, index_);
  ++signals_[counter];
  shared.value.store(base_[counter] + signals_[counter], std::memory_order_seq_cst);
  if (shared.num_sleepers.load(std::memory_order_seq_cst) != 0) futex_wake_all(shared.value);
}

void LocalTeam::await(Counter counter, int local, uint32_t n) const {
  if (local != index_) wait_for(counter_of(counter, local), base_[counter] + n, local);
}

void LocalTeam::await_all(Counter counter, uint32_t n) const {
  for (int local = 0; local < size_; ++local) await(counter, local, n);
}

void LocalTeam::count_done(ClaimSet& set, uint32_t total) {
  const uint32_t done = set.done.value.fetch_add(1, std::memory_order_seq_cst) + 1;
  if (done == total && set.done.num_sleepers.load(std::memory_order_seq_cst) != 0) {
    futex_wake_all(set.done.value);
  }
}

void LocalTeam::await_done(const ClaimSet& set, uint32_t total) const { wait_for(set.done, total, kAnyone); }

bool LocalTeam::all_signalled(Counter counter, uint32_t n) const {
  for (int local = 0; local < size_; ++local) {
    const SharedCounter& shared = counter_of(counter, local);
    if (!reached(shared.value.load(std::memory_order_acquire), base_[counter] + n)) return false;
  }
  return true;
}

// First spin, because the others are usually microseconds away; then let others run; then sleep on the
// counter.
void LocalTeam::wait_for(const SharedCounter& counter, uint32_t target, int local) const {
  for (int spin = 0; spin < num_spins_; ++spin) {
    if (reached(counter.value.load(std::memory_order_acquire), target)) return;
    pause_cpu();
  }
  auto& sleepers = const_cast<SharedCounter&>(counter).num_sleepers;
  for (int round = 0;; ++round) {
    const uint32_t value = counter.value.load(std::memory_order_seq_cst);
    if (reached(value, target)) return;
    faults_.check();
    const int left = first_left(local);
    // Read again after the flag: what a rank signalled before it left still counts.
    if (left >= 0 && !reached(counter.value.load(std::memory_order_seq_cst), target)) {
      faults_.fail_left(left, mine());
    }
    if (round < num_yields_) {
      ::sched_yield();
      continue;
    }
    const auto now = Clock::now();
    if (now >= deadline_) time_out(local);
    const auto remaining = std::chrono::ceil<std::chrono::milliseconds>(deadline_ - now);
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    futex_wait(counter.value, value, std::min(remaining, kLongestSleep));
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
}

int LocalTeam::first_left(int local) const {
  const std::vector<int>& ranks = topology_.local_ranks();
  if (local != kAnyone) return faults_.has_left(ranks[local]) ? ranks[local] : -1;
  const auto left =
      std::find_if(ranks.begin(), ranks.end(), [&](int rank) { return faults_.has_left(rank); });
  return left == ranks.end() ? -1 : *left;
}

// Where anyone could have done the work, those are missing who are still in a tile.
void LocalTeam::time_out(int local) const {
  std::vector<int> missing;
  for (int peer = 0; peer < size_; ++peer) {
    const bool working = block_.slot(peer).working.load(std::memory_order_relaxed) != 0;
    if (local == kAnyone ? working && peer != index_ : peer == local) {
      missing.push_back(topology_.local_ranks()[peer]);
    }
  }
  faults_.give_up(missing, mine());
}

}  // namespace mlsys::comm
