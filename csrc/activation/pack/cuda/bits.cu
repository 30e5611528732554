// bool and positive floats as bits, on CUDA: a thread has 8 elements and their byte.
//
// Formulas in bits.h, layout in forms.h; contract and bits are those of ../mask.cpp and ../positive.cpp; any
// alignment of the elements. Test: tests/activation/test_packing_cuda.py (marker gpu).
#include "activation/pack/bits.h"
#include "activation/pack/cuda/vectors.cuh"

namespace mlsys::packing::cuda {
namespace {

constexpr int kOfThread = 8;

__device__ __forceinline__ bool is_true(uint8_t byte) { return byte != 0; }
template <class T>
__device__ __forceinline__ bool is_true(T value) {
  return is_positive(value);
}
__device__ __forceinline__ uint8_t from_bit(uint8_t, uint32_t bit) { return static_cast<uint8_t>(bit); }
template <class T>
__device__ __forceinline__ T from_bit(T, uint32_t bit) {
  return one_or_zero(T{}, bit);
}

template <class T>
__global__ void __launch_bounds__(kThreads) gather(const T* from, uint8_t* to, int64_t numel, bool aligned) {
  const int64_t first = thread_index() * kOfThread;
  if (first >= numel) return;
  const auto values = load<T, kOfThread>(from, first, numel, aligned);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) bits |= static_cast<uint32_t>(is_true(values.at[i])) << i;
  to[first / 8] = static_cast<uint8_t>(bits);
}

template <class T>
__global__ void __launch_bounds__(kThreads) spread(const uint8_t* from, T* to, int64_t numel, bool aligned) {
  const int64_t first = thread_index() * kOfThread;
  if (first >= numel) return;
  const uint32_t bits = from[first / 8];
  Vector<T, kOfThread> values;
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) values.at[i] = from_bit(T{}, bits >> i & 1u);
  store(values, to, first, numel, aligned);
}

template <class T>
void pack_of(const Launch& job) {
  launch(job, kOfThread, "pack_bits", gather<T>, static_cast<const T*>(job.from),
         static_cast<uint8_t*>(job.to), job.numel, is_aligned(job.from));
}

template <class T>
void unpack_of(const Launch& job) {
  launch(job, kOfThread, "unpack_bits", spread<T>, static_cast<const uint8_t*>(job.from),
         static_cast<T*>(job.to), job.numel, is_aligned(job.to));
}

}  // namespace

void pack_bits(const Launch& job) {
  if (job.dtype == DType::kBool) return pack_of<uint8_t>(job);
  with_float(job.dtype, [&]<class T>(T) { pack_of<T>(job); });
}

void unpack_bits(const Launch& job) {
  if (job.dtype == DType::kBool) return unpack_of<uint8_t>(job);
  with_float(job.dtype, [&]<class T>(T) { unpack_of<T>(job); });
}

}  // namespace mlsys::packing::cuda
