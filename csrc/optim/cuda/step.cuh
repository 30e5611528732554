// The fused step on CUDA: one launch for a whole segment table, the same rule functors as the CPU.
//
// A block takes chunks of kChunkElements in a grid-stride loop and finds its segment by binary search. Hyper-
// parameters, step counts, the gradient scale and the skip flag are read from device memory, so nothing is
// synchronised and a captured graph replays with new values. Where all arrays of a segment are 16-byte
// aligned, threads read and write four floats at a time. Compiled with --fmad=false and IEEE division and
// square root, so the bits are the CPU's. Test: tests/optim/test_cuda.py (marker gpu).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "optim/launch.h"
#include "optim/segment.h"

namespace mlsys::cuda {

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(
        std::string("The launch of ") + kernel + " failed: " + cudaGetErrorString(error) +
        ". The kernels are compiled for the architectures in TORCH_CUDA_ARCH_LIST; rebuild for "
        "this GPU, or look at the first CUDA error above.");
  }
}

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 4096;

inline int num_blocks(int64_t chunks) { return static_cast<int>(std::min<int64_t>(chunks, kMaxBlocks)); }

template <class Rule>
__device__ __forceinline__ void step_element(const typename Rule::Scalars& s, float grad, float& param,
                                             float& first, float& second) {
  float state[2] = {first, second};
  Rule::update(s, grad, param, state);
  first = state[0];
  second = state[1];
}

template <class Rule>
__device__ __forceinline__ void step_chunk(const typename Rule::Scalars& s, const Segment& segment,
                                           int64_t begin, int64_t end) {
  auto* param = segment.pointer<float>(segment.param);
  const auto* grad = segment.pointer<const float>(segment.grad);
  auto* m0 = segment.pointer<float>(segment.state[0]);
  auto* m1 = segment.pointer<float>(segment.state[1]);
  constexpr int kStates = Rule::kNumStates;
  int64_t scalar_from = begin;
  const int64_t addresses = segment.param | segment.grad | segment.state[0] | segment.state[1];
  if (addresses % 16 ==
      0) {  // chunks begin at multiples of four elements, so alignment holds inside them too
    const int64_t quads = (end - begin) / 4;
    for (int64_t q = threadIdx.x; q < quads; q += blockDim.x) {
      const int64_t i = begin / 4 + q;
      float4 p = reinterpret_cast<float4*>(param)[i], a{}, b{};
      const float4 g = reinterpret_cast<const float4*>(grad)[i];
      if constexpr (kStates > 0) a = reinterpret_cast<float4*>(m0)[i];
      if constexpr (kStates > 1) b = reinterpret_cast<float4*>(m1)[i];
      step_element<Rule>(s, g.x, p.x, a.x, b.x);
      step_element<Rule>(s, g.y, p.y, a.y, b.y);
      step_element<Rule>(s, g.z, p.z, a.z, b.z);
      step_element<Rule>(s, g.w, p.w, a.w, b.w);
      reinterpret_cast<float4*>(param)[i] = p;
      if constexpr (kStates > 0) reinterpret_cast<float4*>(m0)[i] = a;
      if constexpr (kStates > 1) reinterpret_cast<float4*>(m1)[i] = b;
    }
    scalar_from = begin + quads * 4;
  }
  for (int64_t i = scalar_from + threadIdx.x; i < end; i += blockDim.x) {
    float p = param[i], a = kStates > 0 ? m0[i] : 0.0f, b = kStates > 1 ? m1[i] : 0.0f;
    step_element<Rule>(s, grad[i], p, a, b);
    param[i] = p;
    if constexpr (kStates > 0) m0[i] = a;
    if constexpr (kStates > 1) m1[i] = b;
  }
}

template <class Rule, class StatelessRule>
__global__ void __launch_bounds__(kThreads) step_kernel(StepLaunch launch) {
  if (launch.control[1] != 0.0) return;
  __shared__ typename Rule::Scalars scalars;
  __shared__ int64_t row;
  for (int64_t chunk = blockIdx.x; chunk < launch.total_chunks; chunk += gridDim.x) {
    __syncthreads();
    if (threadIdx.x == 0) {
      row = find_segment(launch.segments, launch.num_segments, chunk);
      const Segment& segment = launch.segments[row];
      scalars = Rule::prepare(launch.hyper + segment.hyper_row * kHyperColumns,
                              launch.steps[segment.step_index], launch.control[0]);
    }
    __syncthreads();
    const Segment segment = launch.segments[row];
    const int64_t begin = (chunk - segment.first_chunk) * kChunkElements;
    const int64_t end = begin + kChunkElements < segment.numel ? begin + kChunkElements : segment.numel;
    if (segment.state[0] == 0) {
      step_chunk<StatelessRule>(scalars, segment, begin, end);
    } else {
      step_chunk<Rule>(scalars, segment, begin, end);
    }
  }
}

template <class Rule, class StatelessRule = Rule>
void launch_step(const StepLaunch& launch, const char* name) {
  if (launch.total_chunks == 0) return;
  step_kernel<Rule, StatelessRule>
      <<<num_blocks(launch.total_chunks), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(launch);
  check_launch(name);
}

}  // namespace mlsys::cuda
