// How the packing kernels read and write: a few neighbours a thread, 16 bytes at a time where the array is
// aligned to that, else one by one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "activation/pack/launch.h"
#include "core/cuda/check_launch.h"
#include "core/half.h"

namespace mlsys::packing::cuda {

using mlsys::cuda::check_launch;

constexpr int kThreads = 256;

template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Vector {
  T at[kCount];
};

inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Elements first, first + 1, ...; 0 past the end.
template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> load(const T* from, int64_t first, int64_t numel, bool aligned) {
  using Whole = Vector<T, kCount>;
  if (aligned && first + kCount <= numel) return *reinterpret_cast<const Whole*>(from + first);
  Whole part;
#pragma unroll
  for (int i = 0; i < kCount; ++i) part.at[i] = first + i < numel ? from[first + i] : T{};
  return part;
}

template <class T, int kCount>
__device__ __forceinline__ void store(const Vector<T, kCount>& values, T* to, int64_t first, int64_t numel,
                                      bool aligned) {
  if (aligned && first + kCount <= numel) {
    *reinterpret_cast<Vector<T, kCount>*>(to + first) = values;
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (first + i < numel) to[first + i] = values.at[i];
  }
}

__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

// Launches kernel(arguments...) with a thread for each `of_thread` elements.
template <class Kernel, class... Arguments>
void launch(const Launch& job, int64_t of_thread, const char* name, Kernel kernel, Arguments... arguments) {
  if (job.numel == 0) return;
  const int64_t threads = (job.numel + of_thread - 1) / of_thread;
  kernel<<<static_cast<unsigned>((threads + kThreads - 1) / kThreads), kThreads, 0,
           static_cast<cudaStream_t>(job.stream)>>>(arguments...);
  check_launch(name);
}

}  // namespace mlsys::packing::cuda
