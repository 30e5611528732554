// Rules that scale a tensor's update by norms of the whole tensor, on CUDA: what csrc/optim/tensor_step.h is
// on the CPU, in three launches (measure, add up, apply), capturable like a step.
//
// Each segment is a whole tensor. A block sums a chunk in double: every thread its own elements, then a
// binary tree; a block a tensor adds the chunks in the same way. So sums are the same on every run, and
// differ from the CPU's, which adds in another order, by about 1e-15. Scratch memory comes from the stream's
// pool.
#pragma once

#include "optim/cuda/step.cuh"

namespace mlsys::cuda {

constexpr int kTensorSums = 2;

// Every thread of the block calls it; both sums are valid in thread 0.
__device__ __forceinline__ void block_sums(double (&values)[kTensorSums]) {
  __shared__ double lanes[kTensorSums][kThreads];
  __syncthreads();
  for (int sum = 0; sum < kTensorSums; ++sum) lanes[sum][threadIdx.x] = values[sum];
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) {
      for (int sum = 0; sum < kTensorSums; ++sum) lanes[sum][threadIdx.x] += lanes[sum][threadIdx.x + width];
    }
  }
  for (int sum = 0; sum < kTensorSums; ++sum) values[sum] = lanes[sum][0];
}

template <class Rule>
__device__ __forceinline__ void measure_chunk(const typename Rule::Scalars& s, const Segment& segment,
                                              double step, int64_t begin, int64_t end,
                                              double (&sums)[kTensorSums]) {
  constexpr int64_t kRound = static_cast<int64_t>(kThreads) * kPerThread;
  for (int64_t base = begin; base < end; base += kRound) {
    const int64_t first = base + static_cast<int64_t>(threadIdx.x) * kPerThread;
    const int64_t left = end - first;
    const int count = static_cast<int>(left < 0 ? 0 : left < kPerThread ? left : kPerThread);
    const Eight eight{segment, first, count, step};
    float param[kPerThread], grad[kPerThread], states[kMaxStates][kPerThread] = {};
    eight.read_param(param);
    eight.read_grad(grad);
#pragma unroll
    for (int index = 0; index < Rule::kNumStates; ++index) eight.read_state(index, states[index]);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      float state[kMaxStates] = {states[0][i], states[1][i], states[2][i]};
      const float update = Rule::measure(s, grad[i], param[i], state);
      if (i < count) {
        sums[0] += static_cast<double>(param[i]) * param[i];
        sums[1] += static_cast<double>(update) * update;
      }
#pragma unroll
      for (int index = 0; index < Rule::kNumStates; ++index) states[index][i] = state[index];
    }
#pragma unroll
    for (int index = 0; index < Rule::kNumStates; ++index) eight.write_state(index, states[index]);
  }
}

template <class Rule>
__global__ void __launch_bounds__(kThreads) measure_kernel(StepLaunch launch, double* terms) {
  if (launch.control[1] != 0.0) return;
  __shared__ typename Rule::Scalars scalars;
  __shared__ Segment segment;
  for (int64_t chunk = blockIdx.x; chunk < launch.total_chunks; chunk += gridDim.x) {
    __syncthreads();
    if (threadIdx.x == 0) {
      segment = launch.segments[find_segment(launch.segments, launch.num_segments, chunk)];
      scalars = Rule::prepare(launch.hyper + segment.hyper_row * kHyperColumns,
                              launch.steps[segment.step_index], launch.control[0]);
    }
    __syncthreads();
    const int64_t begin = (chunk - segment.first_chunk) * kChunkElements;
    const int64_t end = begin + kChunkElements < segment.numel ? begin + kChunkElements : segment.numel;
    double sums[kTensorSums] = {};
    measure_chunk<Rule>(scalars, segment, launch.steps[segment.step_index], begin, end, sums);
    block_sums(sums);
    if (threadIdx.x == 0) {
      for (int sum = 0; sum < kTensorSums; ++sum) terms[chunk * kTensorSums + sum] = sums[sum];
    }
  }
}

static __global__ void __launch_bounds__(kThreads)
    add_terms_of_tensors(StepLaunch launch, const double* terms, double* sums) {
  if (launch.control[1] != 0.0) return;
  for (int64_t row = blockIdx.x; row < launch.num_segments; row += gridDim.x) {
    const Segment& segment = launch.segments[row];
    double own[kTensorSums] = {};
    for (int64_t chunk = threadIdx.x; chunk < num_chunks(segment.numel); chunk += kThreads) {
      for (int sum = 0; sum < kTensorSums; ++sum) {
        own[sum] += terms[(segment.first_chunk + chunk) * kTensorSums + sum];
      }
    }
    block_sums(own);
    if (threadIdx.x == 0) {
      for (int sum = 0; sum < kTensorSums; ++sum) sums[row * kTensorSums + sum] = own[sum];
    }
  }
}

template <class Rule>
__global__ void __launch_bounds__(kThreads) apply_kernel(StepLaunch launch, const double* sums) {
  if (launch.control[1] != 0.0) return;
  __shared__ typename Rule::Scalars scalars;
  __shared__ Segment segment;
  for (int64_t chunk = blockIdx.x; chunk < launch.total_chunks; chunk += gridDim.x) {
    __syncthreads();
    if (threadIdx.x == 0) {
      const int64_t row = find_segment(launch.segments, launch.num_segments, chunk);
      segment = launch.segments[row];
      scalars = Rule::prepare(launch.hyper + segment.hyper_row * kHyperColumns,
                              launch.steps[segment.step_index], launch.control[0], sums + row * kTensorSums);
    }
    __syncthreads();
    const int64_t begin = (chunk - segment.first_chunk) * kChunkElements;
    const int64_t end = begin + kChunkElements < segment.numel ? begin + kChunkElements : segment.numel;
    step_chunk<Rule>(scalars, segment, launch.steps[segment.step_index],
                     launch.hyper[segment.hyper_row * kHyperColumns + kAverageDecay], begin, end);
  }
}

template <class Measure, class Apply>
void launch_tensors(const StepLaunch& launch, const char* name) {
  if (launch.total_chunks == 0) return;
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const auto num_doubles = static_cast<size_t>((launch.total_chunks + launch.num_segments) * kTensorSums);
  void* memory = nullptr;
  if (const cudaError_t error = cudaMallocAsync(&memory, num_doubles * sizeof(double), stream);
      error != cudaSuccess) {
    throw std::runtime_error(std::string(name) + " needs " + std::to_string(num_doubles * sizeof(double)) +
                             " bytes for the norms of its tensors: " + cudaGetErrorString(error) +
                             ". Free some device memory.");
  }
  auto* terms = static_cast<double*>(memory);
  double* sums = terms + launch.total_chunks * kTensorSums;
  const int blocks = num_blocks(launch.total_chunks);
  measure_kernel<Measure><<<blocks, kThreads, 0, stream>>>(launch, terms);
  add_terms_of_tensors<<<num_blocks(launch.num_segments), kThreads, 0, stream>>>(launch, terms, sums);
  apply_kernel<Apply><<<blocks, kThreads, 0, stream>>>(launch, sums);
  cudaFreeAsync(memory, stream);
  check_launch(name);
}

}  // namespace mlsys::cuda
