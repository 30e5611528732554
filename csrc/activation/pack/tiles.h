// Walks a tensor in tiles whose result has 16 KiB, over the threads of the pool and by the best instruction
// set.
//
// A result that the caches will not hold is computed in a tile's buffer and streamed to where it belongs: an
// ordinary store would first read the line that it is about to overwrite, which for unpacking is nearly half
// of the traffic.
#pragma once

#include <algorithm>
#include <cstddef>

#include "activation/pack/launch.h"
#include "core/simd_dispatch.h"
#include "core/streaming.h"

namespace mlsys::packing {

constexpr int64_t kTileBytes = 16 << 10;
constexpr int64_t kElementsOfTask = 32 << 10;
constexpr int64_t kStreamedResult = 8 << 20;

// Calls body(first element, count) for each tile of `kElements`, a multiple of kBlock.
template <int64_t kElements, class Body>
void over_tiles(const Job& job, Body&& body) {
  static_assert(kElements % kBlock == 0 && kElements <= kElementsOfTask);
  const int64_t tiles = (job.numel + kElements - 1) / kElements;
  parallel_for(job.pool, tiles, kElementsOfTask / kElements, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      body(tile * kElements, std::min(kElements, job.numel - tile * kElements));
    }
  });
}

// Gives write(target) the place for `bytes` of the result at `to`.
template <class Write>
void write_result(bool streams, void* to, int64_t bytes, Write&& write) {
  if (!streams) return write(to);
  alignas(64) std::byte buffer[kTileBytes];
  write(static_cast<void*>(buffer));
  copy_streaming(to, buffer, static_cast<size_t>(bytes));
}

}  // namespace mlsys::packing
