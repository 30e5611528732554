// Copies that go past the caches: for memory that another core has read and will read again, and for results
// larger than the caches.
//
// An ordinary store to a line that another core holds asks that core to give it up first, one line after the
// other: on some machines (AMD EPYC, Zen 4) 27 ns each, a twentieth of what the reader needs. A streaming
// store takes the line away from all caches and asks nobody. Which of the two pays is measured; see
// comm::LocalTeam::tune().
#pragma once

#include <cstddef>

namespace mlsys {

// The ranges are the same (then nothing happens) or disjoint; any alignment will do.
using Copy = void (*)(void* target, const void* source, size_t bytes);

// memcpy by streaming stores where the CPU has them. What it wrote is visible to whoever sees a later store
// of this thread.
void copy_streaming(void* target, const void* source, size_t bytes);

// By streaming stores or ordinary ones.
Copy copy_by(bool streaming);

// How to write the parts of a result of so many bytes. One that the caches will not hold is streamed: an
// ordinary store would first read the line that it is about to overwrite, a third of the traffic.
Copy copy_for_result(size_t result_bytes);

}  // namespace mlsys
