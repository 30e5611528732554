// The loops behind kernels.h, written once and compiled once for each instruction set.
//
// `#pragma GCC ivdep` says what the contract promises (a destination is one of the sources or disjoint from
// them), so that the compiler vectorises without overlap checks, which an in-place call would fail.
#pragma once

#include <type_traits>

#include "comm/reduce/kernels.h"
#include "core/half.h"

namespace mlsys::comm::loops {

// Accumulator type and conversions of an element type.
template <class Raw>
struct Traits {
  using Partial = Raw;
  static MLSYS_INLINE Partial load(Raw value) { return value; }
  static MLSYS_INLINE Raw finish(Partial value) { return value; }
};
template <>
struct Traits<BFloat16> {
  using Partial = float;
  static MLSYS_INLINE float load(BFloat16 value) { return to_float(value); }
  static MLSYS_INLINE BFloat16 finish(float value) { return to_bfloat16(value); }
};
template <>
struct Traits<Float16> {
  using Partial = float;
  static MLSYS_INLINE float load(Float16 value) { return to_float(value); }
  static MLSYS_INLINE Float16 finish(float value) { return to_float16(value); }
};
struct Bool {
  uint8_t value;
};
template <>
struct Traits<Bool> {
  using Partial = uint8_t;
  static MLSYS_INLINE uint8_t load(Bool raw) { return raw.value != 0; }
  static MLSYS_INLINE Bool finish(uint8_t value) { return {value}; }
};

// Integers are added and multiplied as unsigned numbers of at least 32 bits: they wrap instead of
// overflowing.
template <class T>
using Wide = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

struct Sum {
  template <class T>
  static MLSYS_INLINE T apply(T a, T b) {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(static_cast<Wide<T>>(a) + static_cast<Wide<T>>(b));
    return static_cast<T>(a + b);
  }
};
struct Product {
  template <class T>
  static MLSYS_INLINE T apply(T a, T b) {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b));
    return static_cast<T>(a * b);
  }
};
struct Min {
  template <class T>
  static MLSYS_INLINE T apply(T a, T b) {
    return (a < b || a != a) ? a : b;  // a NaN on either side wins
  }
};
struct Max {
  template <class T>
  static MLSYS_INLINE T apply(T a, T b) {
    return (a > b || a != a) ? a : b;
  }
};
struct BitAnd {
  template <class T>
  static MLSYS_INLINE T apply(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct BitOr {
  template <class T>
  static MLSYS_INLINE T apply(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct BitXor {
  template <class T>
  static MLSYS_INLINE T apply(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};

template <class Raw>
MLSYS_INLINE void load(const void* raw, void* partial, size_t count) {
  using T = Traits<Raw>;
  const auto* in = static_cast<const Raw*>(raw);
  auto* out = static_cast<typename T::Partial*>(partial);
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) out[i] = T::load(in[i]);
}
template <class Raw>
MLSYS_INLINE void load_scaled(const void* raw, void* partial, size_t count, double factor) {
  using T = Traits<Raw>;
  const auto* in = static_cast<const Raw*>(raw);
  auto* out = static_cast<typename T::Partial*>(partial);
  const auto f = static_cast<typename T::Partial>(factor);
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) out[i] = T::load(in[i]) * f;
}
template <class Raw, class Op>
MLSYS_INLINE void load_pair(const void* left, const void* right, void* partial, size_t count) {
  using T = Traits<Raw>;
  const auto* a = static_cast<const Raw*>(left);
  const auto* b = static_cast<const Raw*>(right);
  auto* out = static_cast<typename T::Partial*>(partial);
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) out[i] = Op::apply(T::load(a[i]), T::load(b[i]));
}
template <class Raw, class Op>
MLSYS_INLINE void reduce_pair(const void* left, const void* right, void* raw, size_t count) {
  using T = Traits<Raw>;
  const auto* a = static_cast<const Raw*>(left);
  const auto* b = static_cast<const Raw*>(right);
  auto* out = static_cast<Raw*>(raw);
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) out[i] = T::finish(Op::apply(T::load(a[i]), T::load(b[i])));
}
template <class Raw, class Op>
MLSYS_INLINE void merge(const void* left, const void* right, void* partial, size_t count) {
  using P = typename Traits<Raw>::Partial;
  const auto* a = static_cast<const P*>(left);
  const auto* b = static_cast<const P*>(right);
  auto* out = static_cast<P*>(partial);
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) out[i] = Op::apply(a[i], b[i]);
}
template <class Raw>
MLSYS_INLINE void finish(const void* partial, void* raw, size_t count) {
  using T = Traits<Raw>;
  const auto* in = static_cast<const typename T::Partial*>(partial);
  auto* out = static_cast<Raw*>(raw);
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) out[i] = T::finish(in[i]);
}
template <class Raw>
MLSYS_INLINE void finish_divided(const void* partial, void* raw, size_t count, double divisor) {
  using T = Traits<Raw>;
  const auto* in = static_cast<const typename T::Partial*>(partial);
  auto* out = static_cast<Raw*>(raw);
  const auto d = static_cast<typename T::Partial>(divisor);
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) out[i] = T::finish(in[i] / d);
}

// The three instruction sets: TARGET is the function attribute, empty for the baseline.
#define MLSYS_REDUCE_LEVEL(NAME, TARGET)                                                     \
  template <class Raw, class Op>                                                             \
  struct NAME {                                                                              \
    TARGET static void do_load(const void* r, void* p, size_t n) { load<Raw>(r, p, n); }     \
    TARGET static void do_load_pair(const void* a, const void* b, void* p, size_t n) {       \
      load_pair<Raw, Op>(a, b, p, n);                                                        \
    }                                                                                        \
    TARGET static void do_reduce_pair(const void* a, const void* b, void* r, size_t n) {     \
      reduce_pair<Raw, Op>(a, b, r, n);                                                      \
    }                                                                                        \
    TARGET static void do_merge(const void* a, const void* b, void* p, size_t n) {           \
      merge<Raw, Op>(a, b, p, n);                                                            \
    }                                                                                        \
    TARGET static void do_finish(const void* p, void* r, size_t n) { finish<Raw>(p, r, n); } \
  };                                                                                         \
  template <class Raw>                                                                       \
  struct NAME##Scaling {                                                                     \
    TARGET static void do_load_scaled(const void* r, void* p, size_t n, double f) {          \
      load_scaled<Raw>(r, p, n, f);                                                          \
    }                                                                                        \
    TARGET static void do_finish_divided(const void* p, void* r, size_t n, double d) {       \
      finish_divided<Raw>(p, r, n, d);                                                       \
    }                                                                                        \
  };

MLSYS_REDUCE_LEVEL(Scalar, )
#if MLSYS_HAS_X86_LEVELS
MLSYS_REDUCE_LEVEL(Avx2, MLSYS_TARGET_AVX2)
MLSYS_REDUCE_LEVEL(Avx512, MLSYS_TARGET_AVX512)
#endif
#undef MLSYS_REDUCE_LEVEL

template <class Raw, class Level>
Kernels table() {
  Kernels kernels;
  kernels.load = Level::do_load;
  kernels.load_pair = Level::do_load_pair;
  kernels.reduce_pair = Level::do_reduce_pair;
  kernels.merge = Level::do_merge;
  kernels.finish = Level::do_finish;
  kernels.partial_bytes = sizeof(typename Traits<Raw>::Partial);
  return kernels;
}

template <class Raw, class Op>
Kernels for_level(SimdLevel level) {
#if MLSYS_HAS_X86_LEVELS
  if (level == SimdLevel::kAvx512) return table<Raw, Avx512<Raw, Op>>();
  if (level == SimdLevel::kAvx2) return table<Raw, Avx2<Raw, Op>>();
#endif
  (void)level;
  return table<Raw, Scalar<Raw, Op>>();
}

template <class Raw>
void add_scaling(Kernels& kernels, SimdLevel level) {
  kernels.load_scaled = ScalarScaling<Raw>::do_load_scaled;
  kernels.finish_divided = ScalarScaling<Raw>::do_finish_divided;
#if MLSYS_HAS_X86_LEVELS
  if (level == SimdLevel::kAvx512) {
    kernels.load_scaled = Avx512Scaling<Raw>::do_load_scaled;
    kernels.finish_divided = Avx512Scaling<Raw>::do_finish_divided;
  } else if (level == SimdLevel::kAvx2) {
    kernels.load_scaled = Avx2Scaling<Raw>::do_load_scaled;
    kernels.finish_divided = Avx2Scaling<Raw>::do_finish_divided;
  }
#endif
}

// The operations that floating point has.
template <class Raw>
Kernels floating(ReduceOp op, SimdLevel level) {
  Kernels kernels;
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kAvg:
    case ReduceOp::kPremulSum:
      kernels = for_level<Raw, Sum>(level);
      break;
    case ReduceOp::kProduct:
      kernels = for_level<Raw, Product>(level);
      break;
    case ReduceOp::kMin:
      kernels = for_level<Raw, Min>(level);
      break;
    case ReduceOp::kMax:
      kernels = for_level<Raw, Max>(level);
      break;
    default:
      return {};
  }
  add_scaling<Raw>(kernels, level);
  return kernels;
}

}  // namespace mlsys::comm::loops
