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
__device__ __forceinline__ void measure_chunk(const typename Rule::Scalars& s, const Chunk& chunk,
                                              double (&sums)[kTensorSums]) {
  for (int64_t base = chunk.begin; base < chunk.end; base += kRound) {
    const Eight eight = chunk.eight(base);
    float param[kPerThread], grad[kPerThread], states[kMaxStates][kPerThread] = {};
    eight.read_param(param);
    eight.read_grad(grad);
    eight.read_states<Rule::kNumStates>(states);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      float state[kMaxStates] = {states[0][i], states[1][i], states[2][i]};
      const float update = Rule::measure(s, grad[i], param[i], state);
      if (i < eight.count) {
        sums[0] += static_cast<double>(param[i]) * param[i];
        sums[1] += static_cast<double>(update) * update;
      }
#pragma unroll
      for (int index = 0; index < Rule::kNumStates; ++index) states[index][i] = state[index];
    }
    eight.write_states<Rule::kNumStates>(states);
  }
}

template <class Rule>
__global__ void __launch_bounds__(kThreads) measure_kernel(StepLaunch launch, double* terms) {
  if (launch.control[1] != 0.0) return;
  using Scalars = typename Rule::Scalars;
  for_chunks_of_block<Scalars>(
      launch,
      [](const double* hyper, double step, double grad_scale, int64_t) {
        return Rule::prepare(hyper, step, grad_scale);
      },
      [terms](const Scalars& s, const Chunk& chunk) {
        double sums[kTensorSums] = {};
        measure_chunk<Rule>(s, chunk, sums);
        block_sums(sums);
        if (threadIdx.x == 0) {
          for (int sum = 0; sum < kTensorSums; ++sum) terms[chunk.index * kTensorSums + sum] = sums[sum];
        }
      });
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
  using Scalars = typename Rule::Scalars;
  for_chunks_of_block<Scalars>(
      launch,
      [sums](const double* hyper, double step, double grad_scale, int64_t row) {
        return Rule::prepare(hyper, step, grad_scale, sums + row * kTensorSums);
      },
      [](const Scalars& s, const Chunk& chunk) { step_chunk<Rule>(s, chunk); });
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
