#include "core/convert.h"

#include <stdexcept>
#include <string>

#include "core/half.h"
#include "core/simd_dispatch.h"

namespace mlsys {
namespace {

template <class From, class To>
struct Convert {
  MLSYS_INLINE void operator()(const From* __restrict from, To* __restrict to, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (std::is_same_v<To, BFloat16>) {
        to[i] = to_bfloat16(from[i]);
      } else if constexpr (std::is_same_v<To, Float16>) {
        to[i] = to_float16(from[i]);
      } else {
        to[i] = to_float(from[i]);
      }
    }
  }
};

template <class From, class To>
void run(const void* from, void* to, int64_t count) {
  run_simd(simd_level(), Convert<From, To>{}, static_cast<const From*>(from), static_cast<To*>(to), count);
}

}  // namespace

void convert(const void* from, DType from_type, void* to, DType to_type, int64_t count) {
  const bool from_float = from_type == DType::kFloat32, to_float = to_type == DType::kFloat32;
  if (from_float && to_type == DType::kBFloat16) return run<float, BFloat16>(from, to, count);
  if (from_float && to_type == DType::kFloat16) return run<float, Float16>(from, to, count);
  if (to_float && from_type == DType::kBFloat16) return run<BFloat16, float>(from, to, count);
  if (to_float && from_type == DType::kFloat16) return run<Float16, float>(from, to, count);
  throw std::invalid_argument(std::string("convert: ") + name_of(from_type) + " to " + name_of(to_type) +
                              " was asked for; one side must be float32 and the other bfloat16 or float16.");
}

}  // namespace mlsys
