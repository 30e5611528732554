// Sum of squares on CUDA, in double, in an order that depends on the lengths alone: deterministic on every
// GPU.
//
// Arrays travel in the kernel's arguments, kSpansPerLaunch at a time, so no table is copied to the device and
// the launches can be captured. One block sums one chunk into one term by a binary tree over its threads; a
// last launch of one block adds the terms, thread t taking terms t, t + kThreads, ... in turn, then the same
// tree. Inf gives inf, nan gives nan. The CPU adds in another order, so the two agree to about
// 1e-15, not in bits; to 2^-19 for narrow elements, which the CPU adds in float32 first.
#include "optim/cuda/step.cuh"

namespace mlsys::cuda {
namespace {

constexpr int kSpansPerLaunch = 128;

struct SpanBatch {
  Span spans[kSpansPerLaunch];
  int64_t first_chunk[kSpansPerLaunch + 1];
  int num_spans;
};

// Every thread of the block calls it; the sum is valid in thread 0.
__device__ double block_sum(double value) {
  __shared__ double lanes[kThreads];
  lanes[threadIdx.x] = value;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) lanes[threadIdx.x] += lanes[threadIdx.x + width];
  }
  return lanes[0];
}

template <class T>
__global__ void __launch_bounds__(kThreads) chunk_sums(SpanBatch batch, double* terms) {
  const int64_t chunk = blockIdx.x;
  int span = 0;
  while (span + 1 < batch.num_spans && batch.first_chunk[span + 1] <= chunk) ++span;
  const Span source = batch.spans[span];
  const auto* data = static_cast<const T*>(source.data);
  const int64_t begin = (chunk - batch.first_chunk[span]) * kChunkElements;
  const int64_t end = begin + kChunkElements < source.numel ? begin + kChunkElements : source.numel;
  double sum = 0.0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const double value = to_float(data[i]);
    sum += value * value;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) terms[chunk] = sum;
}

__global__ void __launch_bounds__(kThreads) add_all(const double* terms, int64_t count, double* result) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += terms[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *result = sum;
}

}  // namespace

void chunk_squares(const Span* spans, int64_t num_spans, Stored form, double* terms, void* stream) {
  int64_t written = 0;
  for (int64_t i = 0; i < num_spans;) {
    SpanBatch batch{};
    for (; i < num_spans && batch.num_spans < kSpansPerLaunch; ++i) {
      if (spans[i].numel == 0) continue;
      const int slot = batch.num_spans++;
      batch.spans[slot] = spans[i];
      batch.first_chunk[slot + 1] = batch.first_chunk[slot] + num_chunks(spans[i].numel);
    }
    const int64_t chunks = batch.first_chunk[batch.num_spans];
    if (chunks == 0) continue;
    const auto kernel = form == Stored::kBFloat16  ? chunk_sums<BFloat16>
                        : form == Stored::kFloat16 ? chunk_sums<Float16>
                                                   : chunk_sums<float>;
    kernel<<<static_cast<unsigned>(chunks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        batch, terms + written);
    check_launch("chunk_squares");
    written += chunks;
  }
}

void add_terms(const double* terms, int64_t count, double* result, void* stream) {
  add_all<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(terms, count, result);
  check_launch("add_terms");
}

}  // namespace mlsys::cuda
