// The flag protocol of the all-reduce between GPUs, with threads for ranks and std::atomic for the devices'
// loads and stores: what is shared between two waits is seen whole, halves may be reused, a wait ends when it
// must. The thread sanitizer checks the ordering.
#include <atomic>
#include <chrono>
#include <thread>

#include "check.h"
#include "comm/cuda/rendezvous.h"

namespace {

using namespace mlsys::comm::cuda;

struct HostMemory {
  const std::atomic<bool>* stop;
  uint64_t timeout;

  void store_release(uint32_t* flag, uint32_t value) const {
    std::atomic_ref(*flag).store(value, std::memory_order_release);
  }
  uint32_t load_acquire(const uint32_t* flag) const {
    std::this_thread::yield();  // there are fewer cores than ranks
    return std::atomic_ref(*const_cast<uint32_t*>(flag)).load(std::memory_order_acquire);
  }
  bool stopped() const { return stop->load(std::memory_order_acquire); }
  uint64_t now_ns() const {
    return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
  }
  uint64_t timeout_ns() const { return timeout; }
};

constexpr uint64_t kLong = 600'000'000'000;  // a hang would be the test's own failure, not this timeout's

struct Region {
  Flags flags{};
  int staged[2] = {-1, -1};  // as in the kernel: two halves that alternate
  int results[2] = {-1, -1};
};

// One block of one rank through `calls` two-shot calls that start at number `first`.
void run_rank(std::vector<Region>& regions, int me, uint32_t first, int calls, const HostMemory& memory,
              std::atomic<int>& wrong) {
  const int size = static_cast<int>(regions.size());
  const auto meet = [&](int wait, uint32_t call) {
    for (int peer = 0; peer < size; ++peer) {
      if (peer != me) arrive(memory, &regions[static_cast<size_t>(peer)].flags, wait, 0, me, call);
    }
    for (int peer = 0; peer < size; ++peer) {
      if (peer == me) continue;
      if (await(memory, &regions[static_cast<size_t>(me)].flags, wait, 0, peer, call) != Waited::kMet)
        ++wrong;
    }
  };
  for (int i = 0; i < calls; ++i) {
    const uint32_t call = first + static_cast<uint32_t>(i);
    const size_t half = call % 2;
    regions[static_cast<size_t>(me)].staged[half] = 1000 * i + me;
    meet(0, call);
    for (int peer = 0; peer < size; ++peer) {
      if (regions[static_cast<size_t>(peer)].staged[half] != 1000 * i + peer) ++wrong;
    }
    regions[static_cast<size_t>(me)].results[half] = 7000 * i + me;
    meet(1, call);
    for (int peer = 0; peer < size; ++peer) {
      if (regions[static_cast<size_t>(peer)].results[half] != 7000 * i + peer) ++wrong;
    }
  }
}

void run_all(int size, uint32_t first, int calls) {
  std::vector<Region> regions(static_cast<size_t>(size));
  for (Region& region : regions) {
    for (auto& of_wait : region.flags.arrived) {
      for (auto& of_block : of_wait) std::fill(std::begin(of_block), std::end(of_block), first - 1);
    }
  }
  const std::atomic<bool> stop{false};
  const HostMemory memory{&stop, kLong};
  std::atomic<int> wrong{0};
  std::vector<std::thread> ranks;
  for (int me = 0; me < size; ++me) {
    ranks.emplace_back([&, me] { run_rank(regions, me, first, calls, memory, wrong); });
  }
  for (auto& rank : ranks) rank.join();
  CHECK_EQUAL(wrong.load(), 0);
}

}  // namespace

TEST(gpu_blocks_see_what_others_shared_before_they_met) {
  run_all(2, 1, 3000);
  run_all(3, 1, 500);
}

TEST(gpu_call_numbers_may_wrap_around) { run_all(2, 0xffffffffU - 20, 40); }

TEST(gpu_waits_end_when_the_host_says_so_or_time_is_up) {
  Flags flags{};
  std::atomic<bool> stop{true};
  CHECK(await(HostMemory{&stop, kLong}, &flags, 0, 0, 1, 1) == Waited::kStopped);
  stop = false;
  CHECK(await(HostMemory{&stop, 1000}, &flags, 0, 0, 1, 1) == Waited::kTimedOut);
  flags.arrived[1][3][1] = 8;  // one call ahead of the one that is waited for
  CHECK(await(HostMemory{&stop, 0}, &flags, 1, 3, 1, 7) == Waited::kMet);
}
