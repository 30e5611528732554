// The optimizer kernels that the binding calls. No torch, no CUDA headers: a CUDA stream is a void*.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "optim/segment.h"

namespace mlsys {

struct StepArguments;

// The rules that work element by element, by their names in mlsys_engine/optim/registry.py. One in the list
// has an instantiation file here and one in cuda/; operators and tile steps follow from the list.
#define MLSYS_ELEMENT_RULES(X) \
  X(adagrad)                   \
  X(adam)                      \
  X(adamw)                     \
  X(lion)                      \
  X(schedule_free_adamw)       \
  X(sgd)

// And those that need whole tensors, and the parts of such a rule: they have operators, and no tile steps.
#define MLSYS_STEP_RULES(X) \
  MLSYS_ELEMENT_RULES(X)    \
  X(lamb)                   \
  X(lars)                   \
  X(muon_momentum)          \
  X(muon_apply)

// CPU. One call steps a whole table; see step.h.
#define MLSYS_DECLARE(rule) void rule##_step(const StepArguments& args);
MLSYS_STEP_RULES(MLSYS_DECLARE)
#undef MLSYS_DECLARE
// Reads parameter, gradient and two moments and writes three of them with next to no arithmetic: the
// bandwidth that an AdamW step cannot exceed. For benchmarks.
void stream_probe_step(const StepArguments& args);

struct Span {
  const void* data;
  int64_t numel;
};
// Sum of squares over all spans, in double; see sum_of_squares.cpp for the order, and for why that of narrow
// elements is within 2^-19 of itself only. `form` is float32, bfloat16 or float16, of all of them.
double sum_of_squares(const Span* spans, int64_t num_spans, Stored form, ParallelFor pool);
// The two halves of that sum, for those who hold a part of the spans: a term for each chunk of each span, in
// order, and the sum of terms.
int64_t num_terms(const Span* spans, int64_t num_spans);
void chunk_squares(const Span* spans, int64_t num_spans, Stored form, double* terms, ParallelFor pool);
double add_terms(const double* terms, int64_t count);
// One term: of one chunk, at most kChunkElements.
double chunk_sum_of_squares(const float* chunk, int64_t numel);

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
#define MLSYS_DECLARE(rule) void rule##_step(const StepLaunch& launch);
MLSYS_STEP_RULES(MLSYS_DECLARE)
#undef MLSYS_DECLARE

// The same two halves of the sum of squares of device arrays; `terms` and `result` are on the device.
void chunk_squares(const Span* spans, int64_t num_spans, Stored form, double* terms, void* stream);
void add_terms(const double* terms, int64_t count, double* result, void* stream);

}  // namespace cuda
}  // namespace mlsys
