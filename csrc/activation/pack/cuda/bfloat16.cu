// float32 as bfloat16 on CUDA: a thread has 8 elements.
//
// Contract and bits are those of ../bfloat16.cpp; any alignment of the elements. Test:
// tests/activation/test_packing_cuda.py (marker gpu).
#include "activation/pack/cuda/vectors.cuh"

namespace mlsys::packing::cuda {
namespace {

constexpr int kOfThread = 8;

template <class From, class To>
__global__ void __launch_bounds__(kThreads) convert(const From* from, To* to, int64_t numel, bool aligned) {
  const int64_t first = thread_index() * kOfThread;
  if (first >= numel) return;
  const auto values = load<From, kOfThread>(from, first, numel, aligned);
  Vector<To, kOfThread> converted;
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    if constexpr (sizeof(To) == 2) {
      converted.at[i] = to_bfloat16(values.at[i]);
    } else {
      converted.at[i] = to_float(values.at[i]);
    }
  }
  store(converted, to, first, numel, aligned);
}

template <class From, class To>
void run(const Launch& job, const char* name) {
  launch(job, kOfThread, name, convert<From, To>, static_cast<const From*>(job.from),
         static_cast<To*>(job.to), job.numel, is_aligned(job.from) && is_aligned(job.to));
}

}  // namespace

void pack_bfloat16(const Launch& job) { run<float, BFloat16>(job, "pack_bfloat16"); }
void unpack_bfloat16(const Launch& job) { run<BFloat16, float>(job, "unpack_bfloat16"); }

}  // namespace mlsys::packing::cuda
