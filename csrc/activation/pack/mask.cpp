// bool and bits, without loss. A byte that is not 0 is true. Layout in forms.h, formulas in bits.h; any
// alignment; reference: mlsys_engine/activation/torch_packing.py; test: tests/activation/test_packing.py.
#include <cstring>

#include "activation/pack/bits.h"
#include "activation/pack/tiles.h"

namespace mlsys::packing {
namespace {

struct Gather {
  MLSYS_INLINE void operator()(const uint8_t* __restrict from, uint8_t* __restrict to, int64_t count) const {
    const int64_t whole = count / 8;
    for (int64_t i = 0; i < whole; ++i) {
      uint64_t bytes;
      std::memcpy(&bytes, from + i * 8, sizeof(bytes));
      to[i] = gather_bits(ones_of(bytes));
    }
    if (count % 8 == 0) return;
    uint64_t last = 0;
    for (int64_t i = whole * 8; i < count; ++i) last |= static_cast<uint64_t>(from[i] != 0) << (i % 8 * 8);
    to[whole] = gather_bits(last);
  }
};

struct Spread {
  MLSYS_INLINE void operator()(const uint8_t* __restrict from, uint8_t* __restrict to, int64_t count) const {
    const int64_t whole = count / 8;
    for (int64_t i = 0; i < whole; ++i) {
      const uint64_t bytes = spread_bits(from[i]);
      std::memcpy(to + i * 8, &bytes, sizeof(bytes));
    }
    for (int64_t i = whole * 8; i < count; ++i) to[i] = from[whole] >> (i % 8) & 1;
  }
};

}  // namespace

void pack_mask(const Job& job) {
  const auto* from = static_cast<const uint8_t*>(job.from);
  auto* to = static_cast<uint8_t*>(job.to);
  over_tiles<kTileBytes>(job, [=](int64_t first, int64_t count) {
    run_simd(simd_level(), Gather{}, from + first, to + first / 8, count);
  });
}

void unpack_mask(const Job& job) {
  const auto* from = static_cast<const uint8_t*>(job.from);
  auto* to = static_cast<uint8_t*>(job.to);
  const bool streams = job.numel >= kStreamedResult;
  over_tiles<kTileBytes>(job, [=](int64_t first, int64_t count) {
    write_result(streams, to + first, count, [=](void* target) {
      run_simd(simd_level(), Spread{}, from + first / 8, static_cast<uint8_t*>(target), count);
    });
  });
}

}  // namespace mlsys::packing
