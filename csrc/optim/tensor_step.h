// Rules that scale a tensor's update by norms of the whole tensor: measured in one sweep, applied in another.
//
// Each segment is a whole tensor. A measuring rule updates moments, or nothing, and says for each element
// what its update would be; the squares of parameters and of updates are summed. The applying rule is an
// ordinary one whose prepare() is also given its tensor's sums, and which computes the update again instead
// of reading it from memory. Tensors are taken in batches that fit a cache, so the second sweep finds there
// what the first has read; a tensor that fits none is read twice from memory. Sums are in double, in a fixed
// order (chunk by chunk; inside a chunk by lanes), so neither threads nor batches change them. Reference:
// mlsys_engine/optim/reference.py; tests: tests/optim.
#pragma once

#include <vector>

#include "optim/step.h"

namespace mlsys {

constexpr int kTensorSums = 2;  // of the squares of parameters, and of updates
constexpr int kSumLanes = 16;
constexpr int64_t kBatchElements =
    512 * 1024;  // of tensors that are measured, then applied: 6 MiB with two moments

// Lane j of a sum adds the squares of a chunk's elements j, j + kSumLanes, ... in turn.
struct ChunkSums {
  double lanes[kTensorSums][kSumLanes] = {};

  void total(double* result) {
    for (int sum = 0; sum < kTensorSums; ++sum) {
      for (int width = kSumLanes / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) lanes[sum][j] += lanes[sum][j + width];
      }
      result[sum] = lanes[sum][0];
    }
  }
};

// The measuring rule on elements [begin, end) of float arrays, a block at a time: its updates go to a buffer
// in the first-level cache, so that both the rule and the sums are loops without anything in their way.
template <class Rule>
struct MeasureLoop {
  typename Rule::Scalars scalars;
  const float* param;
  const float* grad;
  float* states[kMaxStates];

  static constexpr int64_t kBlock = BlockOperands::kBlock;

  MLSYS_INLINE void operator()(int64_t begin, int64_t end, ChunkSums* sums) const {
    const typename Rule::Scalars s = scalars;
    alignas(64) float updates[kBlock];
    for (int64_t block = begin; block < end; block += kBlock) {
      const float* p = param + block;
      const float* g = grad + block;
      float* m0 = Rule::kNumStates > 0 ? states[0] + block : nullptr;
      float* m1 = Rule::kNumStates > 1 ? states[1] + block : nullptr;
      if (end - block >= kBlock) {
        measure(s, p, g, m0, m1, updates, kBlock);
        add_squares(p, kBlock, sums->lanes[0]);
        add_squares(updates, kBlock, sums->lanes[1]);
      } else {
        measure(s, p, g, m0, m1, updates, end - block);
        add_squares(p, end - block, sums->lanes[0]);
        add_squares(updates, end - block, sums->lanes[1]);
      }
    }
  }

 private:
  static MLSYS_INLINE void measure(const typename Rule::Scalars& s, const float* __restrict p,
                                   const float* __restrict g, float* __restrict m0, float* __restrict m1,
                                   float* __restrict updates, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      float state[kMaxStates] = {0.0f, 0.0f, 0.0f};
      if constexpr (Rule::kNumStates > 0) state[0] = m0[i];
      if constexpr (Rule::kNumStates > 1) state[1] = m1[i];
      updates[i] = Rule::measure(s, g[i], p[i], state);
      if constexpr (Rule::kNumStates > 0) m0[i] = state[0];
      if constexpr (Rule::kNumStates > 1) m1[i] = state[1];
    }
  }

  static MLSYS_INLINE void add_squares(const float* __restrict said, int64_t count,
                                       double* __restrict lanes) {
    double own[kSumLanes];
    for (int j = 0; j < kSumLanes; ++j) own[j] = lanes[j];
    int64_t i = 0;
    for (; i + kSumLanes <= count; i += kSumLanes) {
      for (int j = 0; j < kSumLanes; ++j) {
        const double value = said[i + j];
        own[j] += value * value;
      }
    }
    for (int j = 0; j < kSumLanes; ++j) lanes[j] = own[j];
    for (int j = 0; i < count; ++i, ++j) lanes[j] += static_cast<double>(said[i]) * said[i];
  }
};

// One chunk of a segment. Everything that is not float32 goes through the block buffers of storage.h.
template <class Rule>
void measure_chunk(const StepArguments& args, const typename Rule::Scalars& scalars, const Segment& s,
                   int64_t begin, int64_t end, double* result) {
  const SimdLevel level = simd_level();
  ChunkSums sums;
  if (s.is_plain()) {
    const MeasureLoop<Rule> loop{scalars,
                                 s.pointer<const float>(s.param),
                                 s.pointer<const float>(s.grad),
                                 {s.pointer<float>(s.state[0]), s.pointer<float>(s.state[1]), nullptr}};
    run_simd(level, loop, begin, end, &sums);
  } else {
    BlockOperands operands(s, Rule::kNumStates, args.steps[s.step_index], 0.0);
    for (int64_t block = begin; block < end; block += BlockOperands::kBlock) {
      const int64_t count = std::min(BlockOperands::kBlock, end - block);
      operands.load(block, count);
      const MeasureLoop<Rule> loop{
          scalars, operands.param(), operands.grad(), {operands.state(0), operands.state(1), nullptr}};
      run_simd(level, loop, int64_t{0}, count, &sums);
      operands.store_states();
    }
  }
  sums.total(result);
}

// Calls body(segment, its number, begin, end) for stretches of all segments; their chunks need not begin at
// 0.
template <class Body>
void over_segments(const StepArguments& args, Body&& body) {
  const Segment& last = args.segments[args.num_segments - 1];
  const int64_t base = args.segments[0].first_chunk;
  parallel_for(args.pool, last.first_chunk + num_chunks(last.numel) - base, 8,
               [&](int64_t first, int64_t stop) {
                 visit_chunks(args.segments, args.num_segments, base + first, base + stop,
                              [&](const Segment& segment, int64_t begin, int64_t end) {
                                body(segment, &segment - args.segments, begin, end);
                              });
               });
}

// The sums of each segment into sums[number * kTensorSums].
template <class Rule>
void measure_segments(const StepArguments& args, double* sums) {
  const Segment& last = args.segments[args.num_segments - 1];
  const int64_t base = args.segments[0].first_chunk;
  const int64_t total = last.first_chunk + num_chunks(last.numel) - base;
  std::vector<double> terms(static_cast<size_t>(total * kTensorSums), 0.0);
  over_segments(args, [&](const Segment& segment, int64_t, int64_t begin, int64_t end) {
    Prepared<Rule> prepared;
    prepared.prepare(args, segment);
    for (int64_t chunk = begin; chunk < end; chunk += kChunkElements) {
      const int64_t term = segment.first_chunk - base + chunk / kChunkElements;
      measure_chunk<Rule>(args, prepared.scalars, segment, chunk, std::min(chunk + kChunkElements, end),
                          &terms[static_cast<size_t>(term * kTensorSums)]);
    }
  });
  for (int64_t i = 0; i < args.num_segments; ++i) {
    const Segment& segment = args.segments[i];
    for (int sum = 0; sum < kTensorSums; ++sum) {
      double added = 0.0;
      for (int64_t chunk = 0; chunk < num_chunks(segment.numel); ++chunk) {
        added += terms[static_cast<size_t>((segment.first_chunk - base + chunk) * kTensorSums + sum)];
      }
      sums[i * kTensorSums + sum] = added;
    }
  }
}

// Steps by a rule whose prepare() takes the sums of the segment last.
template <class Rule>
void apply_segments(const StepArguments& args, const double* sums) {
  over_segments(args, [&](const Segment& segment, int64_t number, int64_t begin, int64_t end) {
    const auto scalars =
        Rule::prepare(args.hyper + segment.hyper_row * kHyperColumns, args.steps[segment.step_index],
                      args.grad_scale, sums + number * kTensorSums);
    step_stretch<Rule>(args, scalars, segment, begin, end);
  });
}

// Both sweeps.
template <class Measure, class Apply>
void step_tensors(const StepArguments& args) {
  check_states<Apply>(args);  // before the moments change
  simd_level();               // throws for a bad MLSYS_SIMD here and not inside the pool
  std::vector<double> sums(static_cast<size_t>(args.num_segments * kTensorSums));
  for (int64_t first = 0, end = 0; first < args.num_segments; first = end) {
    int64_t numel = 0;
    do {
      numel += args.segments[end++].numel;
    } while (end < args.num_segments && numel + args.segments[end].numel <= kBatchElements);
    StepArguments batch = args;
    batch.segments = args.segments + first;
    batch.num_segments = end - first;
    measure_segments<Measure>(batch, sums.data());
    apply_segments<Apply>(batch, sums.data());
  }
}

}  // namespace mlsys
