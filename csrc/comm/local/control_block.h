// The shared-memory control block of one host: a slot per local rank, the poison record, who has left, and
// the buffers through which private memory is staged.
//
// It lives in one memfd that the host's leader makes and passes to the others. Fresh memory is zero and every
// field starts at zero, so nothing is constructed in it. Counters only grow (they wrap; comparisons are by
// signed difference). Each counter has its own cache lines: one line that its owner writes, and one with the
// number of sleepers, which waiters write.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "comm/operation.h"
#include "memory/posix.h"

namespace mlsys::comm {

static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free);

struct alignas(64) SharedCounter {
  std::atomic<uint32_t> value;
  alignas(64) std::atomic<uint32_t> num_sleepers;
};

// Which tiles of an operation's work have been taken and how many are complete; see tile_claims.h. All zero
// when an operation begins.
struct ClaimSet {
  alignas(64) std::atomic<uint32_t> next;
  SharedCounter done;
};

// What the ranks found out about their machine in their first operation; see LocalTeam::tune().
struct Tuning {
  std::atomic<uint32_t> streams;  // of the last probe, nonzero: streaming stores pay
  std::atomic<int64_t> read_ns;   // of the probe under way
};

enum class PoisonKind : uint32_t { kPeerFailed = 1, kMismatch = 2, kTimedOut = 3 };

// kLeft: in good order.
enum Presence : uint32_t { kPresent = 0, kLeft = 1, kDead = 2 };

struct PoisonRecord {
  static constexpr size_t kCauseBytes = 2048;
  std::atomic<uint32_t> state;  // 0 empty, 1 being written, 2 complete
  PoisonKind kind;
  int32_t rank;  // global, -1 unknown
  int64_t pid;
  uint64_t sequence;
  char host[128];
  char op[128];
  char cause[kCauseBytes];
};

// What a survivor tells the others while they regroup; `version` is odd while the text is being written.
struct alignas(64) Notice {
  static constexpr size_t kBytes = 252;
  std::atomic<uint32_t> version;
  char text[kBytes];
};

struct alignas(64) RankSlot {
  static constexpr size_t kInlineBytes = 4096;
  SharedCounter arrived;  // descriptors published
  SharedCounter first;    // two progress counters for the steps inside an operation
  SharedCounter second;
  alignas(64) std::atomic<uint32_t> working;  // nonzero while this rank is in a tile that it has claimed
  alignas(64) Descriptor descriptors[2];      // by parity of the arrival
  alignas(64) std::byte inline_payload[2][kInlineBytes];
};

class ControlBlock {
 public:
  static constexpr size_t kNoticeBytes = Notice::kBytes;
  // Per local rank: the ring through which its private memory is staged.
  static constexpr size_t kStageBytes = 1536 << 10;
  // Per local rank, twice, by parity of the arrival: payload that is published with the descriptor and is too
  // long for the slot.
  static constexpr size_t kEagerBytes = 256 << 10;
  // Per local rank: its contributions to tiles that go to other hosts.
  static constexpr size_t kWireStageBytes = 8 << 20;
  // Per host: tiles that go to, or come from, other hosts. All of it is touched only as far as it is used.
  static constexpr size_t kScratchBytes = 16 << 20;

  // Claims of one operation: this many phases, twice, by parity of the arrival.
  static constexpr size_t kClaimPhases = 4;

  static size_t bytes_for(int local_size, int world_size);
  static UniqueFd make(int local_size, int world_size);

  // Throws when the file is smaller than these sizes need.
  ControlBlock(const UniqueFd& fd, int local_size, int world_size);

  PoisonRecord& poison() const { return *reinterpret_cast<PoisonRecord*>(at(0)); }
  // Whether group rank `rank`, of any host, is still there: a Presence.
  std::atomic<uint32_t>& presence(int rank) const {
    return reinterpret_cast<std::atomic<uint32_t>*>(at(presence_offset_))[rank];
  }
  // Of group rank `rank`, on any host.
  Notice& notice(int rank) const { return reinterpret_cast<Notice*>(at(notices_offset_))[rank]; }
  RankSlot& slot(int local) const { return reinterpret_cast<RankSlot*>(at(slots_offset_))[local]; }
  ClaimSet& claims(uint32_t parity, size_t phase) const {
    return reinterpret_cast<ClaimSet*>(at(claims_offset_))[parity * kClaimPhases + phase];
  }
  Tuning& tuning() const { return *reinterpret_cast<Tuning*>(at(tuning_offset_)); }
  std::byte* eager(int local, uint32_t parity) const {
    return at(eager_offset_ + (static_cast<size_t>(local) * 2 + parity) * kEagerBytes);
  }
  std::byte* stage(int local) const { return at(stages_offset_ + local * kStageBytes); }
  std::byte* wire_stage(int local) const { return at(wire_stages_offset_ + local * kWireStageBytes); }
  std::byte* scratch() const { return at(scratch_offset_); }
  int local_size() const { return local_size_; }
  int world_size() const { return world_size_; }

 private:
  std::byte* at(size_t offset) const { return mapping_.data() + offset; }

  int local_size_;
  int world_size_;
  size_t presence_offset_ = 0;
  size_t notices_offset_ = 0;
  size_t slots_offset_ = 0;
  size_t claims_offset_ = 0;
  size_t tuning_offset_ = 0;
  size_t eager_offset_ = 0;
  size_t stages_offset_ = 0;
  size_t wire_stages_offset_ = 0;
  size_t scratch_offset_ = 0;
  Mapping mapping_;
};

}  // namespace mlsys::comm
