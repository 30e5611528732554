// A copy whose target goes to memory without being read into the caches first.
//
// For targets that another rank reads later and this one never does: an ordinary store would first fetch the
// line, a third of the copy's traffic. The caller ends a series of copies with finish_streaming(), which
// orders them before whatever tells the other rank (streaming stores are outside the usual order of x86).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace mlsys::comm {

inline void stream_copy(void* target, const void* source, size_t bytes) {
#if defined(__x86_64__)
  constexpr size_t kLine = 64;
  auto* to = static_cast<char*>(target);
  const auto* from = static_cast<const char*>(source);
  const size_t head = (kLine - reinterpret_cast<uintptr_t>(to) % kLine) % kLine;
  if (bytes < head + kLine) {
    std::memcpy(to, from, bytes);
    return;
  }
  std::memcpy(to, from, head);
  size_t done = head;
  for (; done + kLine <= bytes; done += kLine) {  // whole lines, or the write-combining buffers flush early
    for (size_t i = 0; i < kLine; i += sizeof(__m128i)) {
      const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + done + i));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + done + i), value);
    }
  }
  std::memcpy(to + done, from + done, bytes - done);
#else
  std::memcpy(target, source, bytes);
#endif
}

inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace mlsys::comm
