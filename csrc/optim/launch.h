// The optimizer kernels that the binding calls. No torch, no CUDA headers: a CUDA stream is a void*.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "optim/segment.h"

namespace mlsys {

struct StepArguments;

// CPU. One call steps a whole table; see step.h. Segments with state[0] == 0 take plain SGD.
void adamw_step(const StepArguments& args);
void sgd_step(const StepArguments& args);
// Reads parameter, gradient and two moments and writes three of them with next to no arithmetic: the
// bandwidth that an AdamW step cannot exceed. For benchmarks.
void stream_probe_step(const StepArguments& args);

struct FloatSpan {
  const float* data;
  int64_t numel;
};
// Sum of squares over all spans, in double; see sum_of_squares.cpp for the order.
double sum_of_squares(const FloatSpan* spans, int64_t num_spans, ParallelFor pool);
// Of one chunk, at most kChunkElements: the term of that sum, for those who add up the terms themselves.
double chunk_sum_of_squares(const FloatSpan& chunk);

namespace cuda {

// All pointers are on the device, so that a step can be captured in a graph: `control` is {grad_scale, skip};
// skip != 0 leaves everything untouched. Throws std::runtime_error with CUDA's words when a launch fails.
struct StepLaunch {
  const Segment* segments;
  int64_t num_segments;
  int64_t total_chunks;
  const double* hyper;
  const float* steps;
  const double* control;
  void* stream;
};
void adamw_step(const StepLaunch& launch);
void sgd_step(const StepLaunch& launch);  // rows of both kinds; a row with state[0] == 0 takes plain SGD

// Sum of squares of device arrays into *result (device). `partials` holds num_partials(spans) doubles
// (device).
int64_t num_partials(const FloatSpan* spans, int64_t num_spans);
void sum_of_squares(const FloatSpan* spans, int64_t num_spans, double* partials, double* result,
                    void* stream);

}  // namespace cuda
}  // namespace mlsys
