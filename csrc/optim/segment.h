// The segment table: what a fused step or a norm pass works on.
//
// A segment is one stretch of memory whose elements share their hyper-parameters, their step count and the
// form in which they are stored: a loose parameter, a run of neighbouring slots of a flat arena (a whole
// arena when nothing divides it), a shard. The table crosses the language boundary as an int64 tensor
// [num_segments, kSegmentColumns]; a row is this struct.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/half.h"

namespace mlsys {

// How the elements of an array are stored. The eight-bit forms are in blocks with a scale, see codes.h.
enum class Stored : uint8_t { kFloat32, kBFloat16, kFloat16, kSigned8, kUnsigned8 };

// Where a narrow parameter keeps the bits that it has no room for. kNone: nowhere, it is rounded
// stochastically. kSplit: 16 more bits beside a bfloat16 parameter. kFloat32: a whole copy.
enum class Master : uint8_t { kNone, kSplit, kFloat32 };

constexpr int kMaxStates = 3;

// Four bits an array, packed as mlsys_engine/optim/formats.py packs them; 0 is float32 everywhere.
struct Format {
  uint64_t bits;

  MLSYS_HD Stored param() const { return static_cast<Stored>(bits & 15u); }
  MLSYS_HD Stored grad() const { return static_cast<Stored>(bits >> 4 & 15u); }
  MLSYS_HD Master master() const { return static_cast<Master>(bits >> 8 & 15u); }
  MLSYS_HD Stored state(int index) const { return static_cast<Stored>(bits >> (12 + 4 * index) & 15u); }
  MLSYS_HD bool zeroes_grad() const { return (bits >> 24 & 1u) != 0; }
};

struct Segment {
  int64_t param;              // address of the parameters, read and written
  int64_t grad;               // address of the gradients, read
  int64_t master;             // address of what Master says; 0 for kNone
  int64_t state[kMaxStates];  // addresses of the rule's moments in its own order; 0 where it has none
  int64_t scale[kMaxStates];  // addresses of the block scales of eight-bit moments, else 0
  int64_t average;            // address of the float32 moving average of the parameters, or 0
  int64_t numel;              // elements in each of them
  int64_t first_chunk;        // number of chunks in all earlier rows
  int64_t hyper_row;          // row of the hyper-parameter table
  int64_t step_index;         // element of the step counts, already advanced for this step
  int64_t format;             // a Format
  int64_t key;                // what random numbers of this parameter depend on, beside step and element
  int64_t first_element;      // the segment's first element counted from its parameter's first one

  template <class T>
  MLSYS_HD T* pointer(int64_t address) const {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
  }
  MLSYS_HD Format stored() const { return {static_cast<uint64_t>(format)}; }
  // Everything float32 and nothing beside the rule's own arrays: what is stepped in place in one go.
  MLSYS_HD bool is_plain() const { return format == 0 && average == 0; }
  MLSYS_HD int num_states() const {
    int count = 0;
    while (count < kMaxStates && state[count] != 0) ++count;
    return count;
  }
};

constexpr int64_t kSegmentColumns = 17;
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

// One row of float64 hyper-parameters a param group; a rule names its own columns, the last one is common.
constexpr int64_t kHyperColumns = 12;
constexpr int64_t kAverageDecay = 11;  // of the moving average of the parameters

}  // namespace mlsys
