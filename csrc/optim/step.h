// The fused step on the CPU: applies a rule to every element of a segment table in one sweep.
//
// Layout: flat arrays, any alignment of whole elements; a segment's arrays do not overlap one another. Every
// stored type is converted to float, the rule computes in float, the result is rounded to nearest even on
// store. The types of parameter, gradient and moment are template parameters, so other precisions are new
// instantiations and not new loops. Elements are independent: threads, chunks and instruction sets never
// change a bit. Inf and nan: whatever the rule's formula gives. Reference: mlsys_engine/optim/reference.py;
// tests: tests/optim.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/parallel.h"
#include "core/simd_dispatch.h"
#include "optim/segment.h"

namespace mlsys {

struct StepArguments {
  const Segment* segments;
  int64_t num_segments;
  const double* hyper;  // [rows, kHyperColumns]
  const float* steps;
  double grad_scale;  // gradients are multiplied by it as they are read
  ParallelFor pool;
};

MLSYS_HD void store(float& to, float value) { to = value; }
MLSYS_HD void store(BFloat16& to, float value) { to = to_bfloat16(value); }
MLSYS_HD void store(Float16& to, float value) { to = to_float16(value); }

template <class Rule, class Param, class Grad, class Moment, bool kPrefetch>
struct SegmentKernel {
  typename Rule::Scalars scalars;
  Param* param;
  const Grad* grad;
  Moment* moment0;
  Moment* moment1;

  // 64 elements a block: four cache lines of each fp32 stream, asked for kAhead elements before their use.
  static constexpr int64_t kBlock = 64;
  static constexpr int64_t kAhead = 512;

  MLSYS_INLINE void operator()(int64_t begin, int64_t end) const {
    const typename Rule::Scalars s = scalars;
    Param* __restrict p = param + begin;
    const Grad* __restrict g = grad + begin;
    Moment* __restrict m0 = Rule::kNumStates > 0 ? moment0 + begin : nullptr;
    Moment* __restrict m1 = Rule::kNumStates > 1 ? moment1 + begin : nullptr;
    const int64_t count = end - begin;
    int64_t done = 0;
    for (; done + kBlock <= count; done += kBlock) {
      if constexpr (kPrefetch) {
        prefetch(p + done + kAhead);
        prefetch(g + done + kAhead);
        if constexpr (Rule::kNumStates > 0) prefetch(m0 + done + kAhead);
        if constexpr (Rule::kNumStates > 1) prefetch(m1 + done + kAhead);
      }
      for (int64_t j = done; j < done + kBlock; ++j) element(s, p, g, m0, m1, j);
    }
    for (; done < count; ++done) element(s, p, g, m0, m1, done);
  }

 private:
  template <class T>
  static MLSYS_INLINE void prefetch(const T* block) {
    for (size_t byte = 0; byte < kBlock * sizeof(T); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(block) + byte);
    }
  }

  static MLSYS_INLINE void element(const typename Rule::Scalars& s, Param* __restrict p,
                                   const Grad* __restrict g, Moment* __restrict m0, Moment* __restrict m1,
                                   int64_t i) {
    float value = to_float(p[i]);
    float state[2] = {0.0f, 0.0f};
    if constexpr (Rule::kNumStates > 0) state[0] = to_float(m0[i]);
    if constexpr (Rule::kNumStates > 1) state[1] = to_float(m1[i]);
    Rule::update(s, to_float(g[i]), value, state);
    store(p[i], value);
    if constexpr (Rule::kNumStates > 0) store(m0[i], state[0]);
    if constexpr (Rule::kNumStates > 1) store(m1[i], state[1]);
  }
};

// Calls visit(segment, begin, end) for the stretches of segments that chunks [first, last) cover, in order; a
// stretch is as long as the segment allows, so that streams are not broken at chunk boundaries.
template <class Visit>
void visit_chunks(const Segment* segments, int64_t num_segments, int64_t first, int64_t last, Visit&& visit) {
  for (int64_t i = find_segment(segments, num_segments, first); i < num_segments && first < last; ++i) {
    const Segment& segment = segments[i];
    const int64_t stop = std::min(last, segment.first_chunk + num_chunks(segment.numel));
    if (stop <= first) continue;
    visit(segment, (first - segment.first_chunk) * kChunkElements,
          std::min(segment.numel, (stop - segment.first_chunk) * kChunkElements));
    first = stop;
  }
}

template <class Rule, class Param, class Grad, class Moment>
void step_stretch(const typename Rule::Scalars& scalars, const Segment& s, int64_t begin, int64_t end) {
  const auto run = [&]<bool kPrefetch>() {
    const SegmentKernel<Rule, Param, Grad, Moment, kPrefetch> kernel{
        scalars, s.pointer<Param>(s.param), s.pointer<const Grad>(s.grad), s.pointer<Moment>(s.state[0]),
        s.pointer<Moment>(s.state[1])};
    run_simd(simd_level(), kernel, begin, end);
  };
  prefetch_pays() ? run.template operator()<true>() : run.template operator()<false>();
}

// StatelessRule, with the same Scalars, serves the segments that carry no moments (SGD without momentum).
template <class Rule, class StatelessRule = Rule, class Param = float, class Grad = float,
          class Moment = float>
void step_segments(const StepArguments& args) {
  if (args.num_segments == 0) return;
  const Segment& last = args.segments[args.num_segments - 1];
  simd_level();  // throws for a bad MLSYS_SIMD here and not inside the pool
  parallel_for(args.pool, last.first_chunk + num_chunks(last.numel), 8, [&](int64_t first, int64_t stop) {
    int64_t row = -1;
    float step = -1.0f;
    typename Rule::Scalars scalars{};
    visit_chunks(args.segments, args.num_segments, first, stop,
                 [&](const Segment& s, int64_t begin, int64_t end) {
                   if (s.hyper_row != row || args.steps[s.step_index] != step) {
                     row = s.hyper_row;
                     step = args.steps[s.step_index];
                     scalars = Rule::prepare(args.hyper + row * kHyperColumns, step, args.grad_scale);
                   }
                   s.state[0] == 0 ? step_stretch<StatelessRule, Param, Grad, Moment>(scalars, s, begin, end)
                                   : step_stretch<Rule, Param, Grad, Moment>(scalars, s, begin, end);
                 });
  });
}

}  // namespace mlsys
