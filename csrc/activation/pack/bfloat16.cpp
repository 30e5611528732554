// float32 as bfloat16: to nearest even, nan stays nan, inf stays inf, and what rounds beyond the largest
// bfloat16 becomes inf, as in torch. Elements aligned to their size. Formula in core/half.h; reference:
// Tensor.to; test: tests/activation/test_packing.py.
#include "activation/pack/tiles.h"

namespace mlsys::packing {
namespace {

struct Narrow {
  MLSYS_INLINE void operator()(const float* __restrict from, BFloat16* __restrict to, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(from[i]);
  }
};

struct Widen {
  MLSYS_INLINE void operator()(const BFloat16* __restrict from, float* __restrict to, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
  }
};

template <class From, class To, class Kernel>
void convert(const Job& job, const Kernel& kernel) {
  const auto* from = static_cast<const From*>(job.from);
  auto* to = static_cast<To*>(job.to);
  constexpr int64_t kSize = sizeof(To);
  const bool streams = job.numel * kSize >= kStreamedResult;
  over_tiles<kTileBytes / kSize>(job, [=](int64_t first, int64_t count) {
    write_result(streams, to + first, count * kSize, [=](void* target) {
      run_simd(simd_level(), kernel, from + first, static_cast<To*>(target), count);
    });
  });
}

}  // namespace

void pack_bfloat16(const Job& job) { convert<float, BFloat16>(job, Narrow{}); }
void unpack_bfloat16(const Job& job) { convert<BFloat16, float>(job, Widen{}); }

}  // namespace mlsys::packing
