// What every algorithm gets: the team of this host, the connections to other hosts, and the counters.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>

#include "comm/bringup/links.h"
#include "comm/fault/operation_guard.h"
#include "comm/reduce/reducer.h"

namespace mlsys::comm {

struct LiveCounters {
  std::atomic<uint64_t> operations{0};
  std::atomic<uint64_t> shm_bytes{0};
  std::atomic<uint64_t> zero_copy_operations{0};

  void add_shm(size_t bytes) { shm_bytes.fetch_add(bytes, std::memory_order_relaxed); }
  void add_zero_copy() { zero_copy_operations.fetch_add(1, std::memory_order_relaxed); }
};

struct Context {
  const Topology& topology;
  const Faults& faults;
  LocalTeam& team;
  Mesh* mesh;  // null when all ranks share this host
  LiveCounters& counters;
  OperationGuard guard;
};

inline const std::byte* at(const void* base, size_t bytes) {
  return static_cast<const std::byte*>(base) + bytes;
}
inline std::byte* at(void* base, size_t bytes) { return static_cast<std::byte*>(base) + bytes; }

inline void copy_bytes(void* target, const void* source, size_t bytes) {
  if (bytes != 0 && target != source) std::memcpy(target, source, bytes);
}

// Part `part` of `parts` of [0, count), the same for everyone. `grain` keeps boundaries on multiples of it.
struct Range {
  size_t first = 0;
  size_t count = 0;
};
inline Range part_of(size_t count, size_t part, size_t parts, size_t grain = 1) {
  const size_t grains = (count + grain - 1) / grain;
  const size_t first = std::min(count, grains * part / parts * grain);
  const size_t last = std::min(count, grains * (part + 1) / parts * grain);
  return {first, last - first};
}

}  // namespace mlsys::comm
