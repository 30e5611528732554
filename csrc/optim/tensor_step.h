// Rules that scale a tensor's update by norms of the whole tensor: measured in one sweep, applied in another.
//
// A measuring rule updates moments, or nothing, and says for each element the kNumSums values whose squares
// are summed; the applying rule is an ordinary one whose prepare() is also given its tensor's sums, and which
// computes the update again instead of reading it from memory. Sums are in double, in a fixed order (chunk by
// chunk; inside a chunk by lanes), so threads never change them. Between the sweeps the caller may add the
// sums of other ranks' shards.
#pragma once

#include <vector>

#include "optim/step.h"

namespace mlsys {

constexpr int kTensorSums = 2;  // columns of the table of sums: [tensors, kTensorSums]

template <class Rule>
struct MeasureLoop {
  typename Rule::Scalars scalars;
  const float* param;
  const float* grad;
  float* states[kMaxStates];

  static constexpr int kLanes = 16;

  MLSYS_INLINE void operator()(int64_t count, double* result) const {
    const typename Rule::Scalars s = scalars;
    const float* __restrict p = param;
    const float* __restrict g = grad;
    float* __restrict m0 = Rule::kNumStates > 0 ? states[0] : nullptr;
    float* __restrict m1 = Rule::kNumStates > 1 ? states[1] : nullptr;
    double lanes[kTensorSums][kLanes] = {};
    float first[kLanes], second[kLanes];
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) element(s, p, g, m0, m1, i + j, first[j], second[j]);
      for (int j = 0; j < kLanes; ++j) {
        lanes[0][j] += static_cast<double>(first[j]) * first[j];
        lanes[1][j] += static_cast<double>(second[j]) * second[j];
      }
    }
    for (int j = 0; i < count; ++i, ++j) {
      element(s, p, g, m0, m1, i, first[0], second[0]);
      lanes[0][j] += static_cast<double>(first[0]) * first[0];
      lanes[1][j] += static_cast<double>(second[0]) * second[0];
    }
    for (int sum = 0; sum < kTensorSums; ++sum) {
      for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) lanes[sum][j] += lanes[sum][j + width];
      }
      result[sum] += lanes[sum][0];
    }
  }

 private:
  static MLSYS_INLINE void element(const typename Rule::Scalars& s, const float* __restrict p,
                                   const float* __restrict g, float* __restrict m0, float* __restrict m1,
                                   int64_t i, float& first, float& second) {
    float state[kMaxStates] = {0.0f, 0.0f, 0.0f};
    if constexpr (Rule::kNumStates > 0) state[0] = m0[i];
    if constexpr (Rule::kNumStates > 1) state[1] = m1[i];
    float values[kTensorSums];
    Rule::measure(s, g[i], p[i], state, values);
    first = values[0];
    second = values[1];
    if constexpr (Rule::kNumStates > 0) m0[i] = state[0];
    if constexpr (Rule::kNumStates > 1) m1[i] = state[1];
  }
};

// Adds up the squares of what Rule::measure says into sums[segment.tensor], which need not be zero before.
template <class Rule>
void measure_segments(const StepArguments& args, double* sums, int64_t num_tensors) {
  std::fill(sums, sums + num_tensors * kTensorSums, 0.0);
  if (args.num_segments == 0) return;
  const Segment& last = args.segments[args.num_segments - 1];
  const int64_t total = last.first_chunk + num_chunks(last.numel);
  std::vector<double> terms(static_cast<size_t>(total * kTensorSums), 0.0);
  const SimdLevel level = simd_level();
  parallel_for(args.pool, total, 8, [&](int64_t first, int64_t stop) {
    Prepared<Rule> prepared;
    visit_chunks(args.segments, args.num_segments, first, stop,
                 [&](const Segment& segment, int64_t begin, int64_t end) {
                   prepared.prepare(args, segment);
                   BlockOperands operands(segment, Rule::kNumStates, args.steps[segment.step_index], 0.0);
                   for (int64_t block = begin; block < end; block += BlockOperands::kBlock) {
                     const int64_t count = std::min(BlockOperands::kBlock, end - block);
                     operands.load(block, count);
                     const MeasureLoop<Rule> loop{prepared.scalars,
                                                  operands.param(),
                                                  operands.grad(),
                                                  {operands.state(0), operands.state(1), nullptr}};
                     const int64_t chunk = segment.first_chunk + block / kChunkElements;
                     run_simd(level, loop, count, &terms[static_cast<size_t>(chunk * kTensorSums)]);
                     operands.store_states();
                   }
                 });
  });
  for (int64_t i = 0; i < args.num_segments; ++i) {
    const Segment& segment = args.segments[i];
    for (int64_t chunk = 0; chunk < num_chunks(segment.numel); ++chunk) {
      for (int sum = 0; sum < kTensorSums; ++sum) {
        sums[segment.tensor * kTensorSums + sum] +=
            terms[static_cast<size_t>((segment.first_chunk + chunk) * kTensorSums + sum)];
      }
    }
  }
}

// Steps by a rule whose prepare() takes the sums of the segment's tensor last.
template <class Rule>
void apply_segments(const StepArguments& args, const double* sums) {
  if (args.num_segments == 0) return;
  check_states<Rule>(args);
  const Segment& last = args.segments[args.num_segments - 1];
  simd_level();
  parallel_for(args.pool, last.first_chunk + num_chunks(last.numel), 8, [&](int64_t first, int64_t stop) {
    visit_chunks(args.segments, args.num_segments, first, stop,
                 [&](const Segment& segment, int64_t begin, int64_t end) {
                   const auto scalars = Rule::prepare(args.hyper + segment.hyper_row * kHyperColumns,
                                                      args.steps[segment.step_index], args.grad_scale,
                                                      sums + segment.tensor * kTensorSums);
                   step_stretch<Rule>(args, scalars, segment, begin, end);
                 });
  });
}

// Both sweeps, over tensors that are here as a whole.
template <class Measure, class Apply>
void step_tensors(const StepArguments& args) {
  int64_t num_tensors = 0;
  for (int64_t i = 0; i < args.num_segments; ++i) {
    num_tensors = std::max(num_tensors, args.segments[i].tensor + 1);
  }
  std::vector<double> sums(static_cast<size_t>(num_tensors * kTensorSums));
  check_states<Apply>(args);  // before the moments change
  measure_segments<Measure>(args, sums.data(), num_tensors);
  apply_segments<Apply>(args, sums.data());
}

}  // namespace mlsys
