// The segment table: what a fused step or a norm pass works on.
//
// A segment is one stretch of memory whose elements share their hyper-parameters and their step count: a
// loose parameter, a run of neighbouring slots of a flat arena (a whole arena when nothing divides it), later
// a shard. The table crosses the language boundary as an int64 tensor [num_segments, kSegmentColumns]; a row
// is this struct.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/half.h"

namespace mlsys {

struct Segment {
  int64_t param;        // address of the parameters, read and written
  int64_t grad;         // address of the gradients, read
  int64_t state[2];     // addresses of the rule's moments in its own order; 0 where it has none
  int64_t numel;        // elements in each of them
  int64_t first_chunk;  // number of chunks in all earlier rows
  int64_t hyper_row;    // row of the hyper-parameter table
  int64_t step_index;   // element of the step counts, already advanced for this step

  template <class T>
  MLSYS_HD T* pointer(int64_t address) const {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
  }
};

constexpr int64_t kSegmentColumns = 8;
static_assert(sizeof(Segment) == kSegmentColumns * sizeof(int64_t));

// Threads and thread blocks share a segment in chunks of this many elements.
constexpr int64_t kChunkElements = 4096;

MLSYS_HD int64_t num_chunks(int64_t numel) { return (numel + kChunkElements - 1) / kChunkElements; }

// Index of the segment that holds `chunk`: the last one whose first_chunk is not above it.
MLSYS_HD int64_t find_segment(const Segment* segments, int64_t num_segments, int64_t chunk) {
  int64_t low = 0, high = num_segments;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (segments[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// One row of float64 hyper-parameters a param group; a rule names its own columns.
constexpr int64_t kHyperColumns = 8;

}  // namespace mlsys
