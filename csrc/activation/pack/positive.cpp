// Whether each element of a float tensor is positive, as a bit, and ones and zeros of the dtype: what the
// backward of ReLU reads of its result, without loss. Nan counts as positive, as it does there; -0 does not.
// Layout in forms.h, formulas in bits.h; elements aligned to their size; reference:
// mlsys_engine/activation/torch_packing.py; test: tests/activation/test_packing.py.
#include <cstring>

#include "activation/pack/bits.h"
#include "activation/pack/tiles.h"

namespace mlsys::packing {
namespace {

constexpr int64_t kStretch = 256;  // elements whose truth waits in bytes before it becomes bits

struct GatherPositive {
  template <class T>
  MLSYS_INLINE void operator()(const T* __restrict from, uint8_t* __restrict to, int64_t count) const {
    alignas(64) uint8_t truth[kStretch];
    for (int64_t first = 0; first < count; first += kStretch) {
      const T* stretch = from + first;
      if (count - first >= kStretch) {
        for (int64_t i = 0; i < kStretch; ++i) truth[i] = is_positive(stretch[i]);
        gather(truth, to + first / 8, kStretch / 8);
      } else {
        std::memset(truth, 0, sizeof(truth));
        for (int64_t i = 0; i < count - first; ++i) truth[i] = is_positive(stretch[i]);
        gather(truth, to + first / 8, (count - first + 7) / 8);
      }
    }
  }

  static MLSYS_INLINE void gather(const uint8_t* __restrict truth, uint8_t* __restrict to, int64_t bytes) {
    for (int64_t i = 0; i < bytes; ++i) {
      uint64_t ones;
      std::memcpy(&ones, truth + i * 8, sizeof(ones));
      to[i] = gather_bits(ones);
    }
  }
};

// 32 bits are spread over the lanes of a vector by shifts.
struct SpreadPositive {
  template <class T>
  MLSYS_INLINE void operator()(const uint8_t* __restrict from, T* __restrict to, int64_t count) const {
    constexpr int64_t kRun = 32;
    const int64_t whole = count / kRun;
    for (int64_t r = 0; r < whole; ++r) {
      uint32_t bits;
      std::memcpy(&bits, from + r * (kRun / 8), sizeof(bits));
      T* __restrict run = to + r * kRun;
#pragma GCC unroll 1
      for (uint32_t j = 0; j < kRun; ++j) run[j] = one_or_zero(T{}, bits >> j & 1u);
    }
    for (int64_t i = whole * kRun; i < count; ++i) {
      to[i] = one_or_zero(T{}, static_cast<uint32_t>(from[i / 8]) >> (i % 8) & 1u);
    }
  }
};

}  // namespace

void pack_positive(const Job& job) {
  auto* to = static_cast<uint8_t*>(job.to);
  with_float(job.dtype, [&]<class T>(T) {
    const auto* from = static_cast<const T*>(job.from);
    over_tiles<kTileBytes>(job, [=](int64_t first, int64_t count) {
      run_simd(simd_level(), GatherPositive{}, from + first, to + first / 8, count);
    });
  });
}

void unpack_positive(const Job& job) {
  const auto* from = static_cast<const uint8_t*>(job.from);
  with_float(job.dtype, [&]<class T>(T) {
    auto* to = static_cast<T*>(job.to);
    constexpr int64_t kSize = sizeof(T);
    const bool streams = job.numel * kSize >= kStreamedResult;
    over_tiles<kTileBytes / kSize>(job, [=](int64_t first, int64_t count) {
      write_result(streams, to + first, count * kSize, [=](void* target) {
        run_simd(simd_level(), SpreadPositive{}, from + first / 8, static_cast<T*>(target), count);
      });
    });
  });
}

}  // namespace mlsys::packing
