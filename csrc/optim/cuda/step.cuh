// The fused step on CUDA: one launch for a whole segment table, the same rule functors as the CPU.
//
// A block takes chunks of kChunkElements in a grid-stride loop and finds its segment by binary search. Hyper-
// parameters, step counts, the gradient scale and the skip flag are read from device memory, so nothing is
// synchronised and a captured graph replays with new values. Threads read and write 16 bytes at a time where
// arrays are aligned; forms other than float32 are unpacked in registers (operands.cuh). Compiled with
// --fmad=false and IEEE division and square root, so the bits are the CPU's. Test: tests/optim/test_cuda.py
// (marker gpu).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "core/cuda/check_launch.h"
#include "optim/cuda/operands.cuh"
#include "optim/launch.h"
#include "optim/segment.h"

namespace mlsys::cuda {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 4096;

inline int num_blocks(int64_t chunks) { return static_cast<int>(std::min<int64_t>(chunks, kMaxBlocks)); }

// A chunk that a block works on: elements [begin, end) of a segment, which lies in shared memory.
struct Chunk {
  const Segment& segment;
  int64_t index, begin, end;
  double step, average_decay;

  // This thread's part of the block's round that begins at `base`: eight elements, at the end fewer or none.
  __device__ __forceinline__ Eight eight(int64_t base) const {
    const int64_t first = base + static_cast<int64_t>(threadIdx.x) * kPerThread;
    const int64_t left = end - first;
    return {segment, first, static_cast<int>(left < 0 ? 0 : left < kPerThread ? left : kPerThread), step};
  }
};
constexpr int64_t kRound = static_cast<int64_t>(kThreads) * kPerThread;

// Calls body(scalars, chunk) with all threads for each of the block's chunks, in a grid-stride loop. One
// thread makes the scalars: prepare(hyper row, step, grad_scale, number of the segment).
template <class Scalars, class Prepare, class Body>
__device__ __forceinline__ void for_chunks_of_block(const StepLaunch& launch, Prepare prepare, Body body) {
  __shared__ Scalars scalars;
  __shared__ Segment segment;
  for (int64_t index = blockIdx.x; index < launch.total_chunks; index += gridDim.x) {
    __syncthreads();
    if (threadIdx.x == 0) {
      const int64_t row = find_segment(launch.segments, launch.num_segments, index);
      segment = launch.segments[row];
      scalars = prepare(launch.hyper + segment.hyper_row * kHyperColumns, launch.steps[segment.step_index],
                        launch.control[0], row);
    }
    __syncthreads();
    const int64_t begin = (index - segment.first_chunk) * kChunkElements;
    const int64_t end = begin + kChunkElements < segment.numel ? begin + kChunkElements : segment.numel;
    body(scalars, Chunk{segment, index, begin, end, launch.steps[segment.step_index],
                        launch.hyper[segment.hyper_row * kHyperColumns + kAverageDecay]});
  }
}

template <class Rule>
__device__ __forceinline__ void step_chunk(const typename Rule::Scalars& s, const Chunk& chunk) {
  for (int64_t base = chunk.begin; base < chunk.end; base += kRound) {
    const Eight eight = chunk.eight(base);
    float param[kPerThread], grad[kPerThread], states[kMaxStates][kPerThread] = {};
    eight.read_param(param);
    eight.read_grad(grad);
    eight.read_states<Rule::kNumStates>(states);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      float state[kMaxStates] = {states[0][i], states[1][i], states[2][i]};
      Rule::update(s, grad[i], param[i], state);
#pragma unroll
      for (int index = 0; index < Rule::kNumStates; ++index) states[index][i] = state[index];
    }
    eight.write_param(param);
    eight.write_states<Rule::kNumStates>(states);
    if (chunk.segment.average != 0) eight.average(param, chunk.average_decay);
    if (chunk.segment.stored().zeroes_grad()) eight.zero_grad();
  }
}

// One rule of the family after the other until one has the segment's number of states.
template <class First, class... Others>
__device__ __forceinline__ void step_chunk_of(const typename First::Scalars& s, const Chunk& chunk) {
  if (chunk.segment.num_states() == First::kNumStates) {
    step_chunk<First>(s, chunk);
  } else if constexpr (sizeof...(Others) > 0) {
    step_chunk_of<Others...>(s, chunk);
  }
}

template <class First, class... Others>
__global__ void __launch_bounds__(kThreads) step_kernel(StepLaunch launch) {
  if (launch.control[1] != 0.0) return;
  using Scalars = typename First::Scalars;
  for_chunks_of_block<Scalars>(
      launch,
      [](const double* hyper, double step, double grad_scale, int64_t) {
        return First::prepare(hyper, step, grad_scale);
      },
      [](const Scalars& s, const Chunk& chunk) { step_chunk_of<First, Others...>(s, chunk); });
}

template <class... Rules>
void launch_step(const StepLaunch& launch, const char* name) {
  if (launch.total_chunks == 0) return;
  step_kernel<Rules...>
      <<<num_blocks(launch.total_chunks), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(launch);
  check_launch(name);
}

}  // namespace mlsys::cuda
