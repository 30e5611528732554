#include "core/streaming.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/cpu.h"

#if MLSYS_HAS_X86_LEVELS
#include <immintrin.h>
#endif

namespace mlsys {
namespace {

constexpr size_t kLine = 64;
// Below, the last-level cache absorbs the traffic, and what reads the result finds it there.
constexpr size_t kStreamedResult = 8 << 20;

#if MLSYS_HAS_X86_LEVELS
// `target` is aligned to a line; whole lines only.
MLSYS_TARGET_AVX512 void copy_lines_avx512(std::byte* target, const std::byte* source, size_t bytes) {
  for (size_t i = 0; i < bytes; i += kLine) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
  }
}

void copy_lines_sse2(std::byte* target, const std::byte* source, size_t bytes) {
  for (size_t i = 0; i < bytes; i += sizeof(__m128i)) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
  }
}
#endif

void copy_cached(void* target, const void* source, size_t bytes) {
  if (bytes != 0 && target != source) std::memcpy(target, source, bytes);
}

}  // namespace

void copy_streaming(void* target, const void* source, size_t bytes) {
#if MLSYS_HAS_X86_LEVELS
  if (target == source) return;
  auto* to = static_cast<std::byte*>(target);
  const auto* from = static_cast<const std::byte*>(source);
  const size_t head = std::min(bytes, (kLine - reinterpret_cast<uintptr_t>(to) % kLine) % kLine);
  const size_t lines = (bytes - head) / kLine * kLine;
  if (head != 0) std::memcpy(to, from, head);
  if (simd_level() == SimdLevel::kAvx512) {
    copy_lines_avx512(to + head, from + head, lines);
  } else {
    copy_lines_sse2(to + head, from + head, lines);
  }
  if (head + lines != bytes) std::memcpy(to + head + lines, from + head + lines, bytes - head - lines);
  _mm_sfence();  // a release store alone does not wait for streaming stores
#else
  copy_cached(target, source, bytes);
#endif
}

Copy copy_by(bool streaming) { return streaming ? copy_streaming : copy_cached; }

Copy copy_for_result(size_t result_bytes) { return copy_by(result_bytes >= kStreamedResult); }

}  // namespace mlsys
