// How blocks of different ranks wait for each other, without the host: flags in memory that peers have
// mapped.
//
// Each rank's region holds a flag for every (step, block, rank). A block arrives by writing the number of its
// call into its own flag in every peer's region, with release, and waits until its own region's flags of all
// peers have reached that number, with acquire. Only plain loads and stores travel between devices, because
// PCIe carries no atomics. A peer may be one call ahead, so a flag is compared by "at least", on a circle.
//
// One wait in every call is enough to reuse memory that alternates between two halves by the call's number:
// when a block passes a wait of call n, all peers' kernels n run, so their kernels n-1 are over, and nobody
// reads what call n-1 shared; call n+1 overwrites that.
//
// Numbers live on the device, so a captured graph replays with new ones. A wait ends early when the host sets
// the stop word (a peer died) or when it has lasted too long. The template takes the memory's operations, so
// that tests/native/test_cuda_rendezvous.cpp can run the protocol on std::atomic with threads.
#pragma once

#include <cstdint>

#include "comm/cuda/steps.h"

namespace mlsys::comm::cuda {

constexpr int kBlocks = 32;
constexpr int kWaits = 2;                    // the most in one call: two-shot
constexpr uint32_t kSpinsBetweenLooks = 64;  // at the stop word and the clock, which cost a trip to the host

struct Flags {
  uint32_t arrived[kWaits][kBlocks][kMostRanks];
  uint32_t calls[kBlocks];  // finished by this rank's block; touched by itself alone
};

enum class Waited : uint32_t { kMet = 0, kStopped = 1, kTimedOut = 2 };

// Whether `flag` has come to call number `call`; numbers wrap around.
MLSYS_HD bool reached(uint32_t flag, uint32_t call) { return static_cast<int32_t>(flag - call) >= 0; }

template <class Memory>
MLSYS_HD void arrive(const Memory& memory, Flags* theirs, int wait, int block, int rank, uint32_t call) {
  memory.store_release(&theirs->arrived[wait][block][rank], call);
}

template <class Memory>
MLSYS_HD Waited await(const Memory& memory, const Flags* mine, int wait, int block, int peer, uint32_t call) {
  const uint32_t* flag = &mine->arrived[wait][block][peer];
  if (reached(memory.load_acquire(flag), call)) return Waited::kMet;
  const uint64_t start = memory.now_ns();
  for (uint32_t spin = 1;; ++spin) {
    if (reached(memory.load_acquire(flag), call)) return Waited::kMet;
    if (spin % kSpinsBetweenLooks != 0) continue;
    if (memory.stopped()) return Waited::kStopped;
    if (memory.now_ns() - start > memory.timeout_ns()) return Waited::kTimedOut;
  }
}

}  // namespace mlsys::comm::cuda
