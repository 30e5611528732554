// Streaming copies against memcpy, at every alignment, with guards on both sides.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "core/streaming.h"

TEST(streaming_copies_are_copies_at_any_alignment_and_length) {
  constexpr size_t kRoom = 1024;
  std::vector<uint8_t> source(kRoom), target(kRoom), wanted(kRoom);
  for (size_t i = 0; i < kRoom; ++i) source[i] = static_cast<uint8_t>(i * 31 + 7);
  for (const size_t length : {size_t{0}, size_t{1}, size_t{15}, size_t{63}, size_t{64}, size_t{65},
                              size_t{127}, size_t{128}, size_t{300}, size_t{777}}) {
    for (size_t to = 0; to < 130; ++to) {
      for (const size_t from : {size_t{0}, size_t{1}, size_t{32}, size_t{67}}) {
        std::fill(target.begin(), target.end(), uint8_t{0xEE});
        wanted = target;
        std::memcpy(wanted.data() + to, source.data() + from, length);
        mlsys::copy_streaming(target.data() + to, source.data() + from, length);
        CHECK(target == wanted);
      }
    }
  }
}
