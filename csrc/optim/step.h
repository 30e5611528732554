// The fused step on the CPU: applies a rule to every element of a segment table in one sweep.
//
// Layout: arrays of any alignment of whole elements; a segment's arrays do not overlap one another. Every
// stored form becomes float, the rule computes in float, and the result is put back (storage.h). Elements are
// independent, but for the scale that a block of eight-bit moments shares: threads, chunks and instruction
// sets never change a bit. Inf and nan: whatever the rule's formula gives. Reference:
// mlsys_engine/optim/reference.py; tests: tests/optim.
//
// A rule family is one or more rules with the same Scalars and different numbers of states; a segment takes
// the one that has as many states as it. What needs norms of whole tensors is in tensor_step.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/parallel.h"
#include "core/simd_dispatch.h"
#include "optim/segment.h"
#include "optim/storage.h"

namespace mlsys {

struct StepArguments {
  const Segment* segments;
  int64_t num_segments;
  const double* hyper;  // [rows, kHyperColumns]
  const float* steps;
  double grad_scale;  // gradients are multiplied by it as they are read
  ParallelFor pool;
};

// Whether a rule changes the parameter alone and does not read the gradient (tensor_step.h): saves their
// traffic.
template <class Rule>
constexpr bool kOnlyParam = requires { Rule::kOnlyParam; };

// The rule on elements [begin, end) of float arrays.
template <class Rule, bool kPrefetch>
struct RuleLoop {
  typename Rule::Scalars scalars;
  float* param;
  const float* grad;
  float* states[kMaxStates];

  // 64 elements a block: four cache lines of each stream, asked for kAhead elements before their use.
  static constexpr int64_t kBlock = 64;
  static constexpr int64_t kAhead = 512;

  MLSYS_INLINE void operator()(int64_t begin, int64_t end) const {
    const typename Rule::Scalars s = scalars;
    float* __restrict p = param + begin;
    const float* __restrict g = grad + begin;
    float* __restrict m0 = Rule::kNumStates > 0 ? states[0] + begin : nullptr;
    float* __restrict m1 = Rule::kNumStates > 1 ? states[1] + begin : nullptr;
    float* __restrict m2 = Rule::kNumStates > 2 ? states[2] + begin : nullptr;
    const int64_t count = end - begin;
    int64_t done = 0;
    for (; done + kBlock <= count; done += kBlock) {
      if constexpr (kPrefetch) {
        prefetch(p + done + kAhead);
        if constexpr (!kOnlyParam<Rule>) prefetch(g + done + kAhead);
        if constexpr (Rule::kNumStates > 0) prefetch(m0 + done + kAhead);
        if constexpr (Rule::kNumStates > 1) prefetch(m1 + done + kAhead);
        if constexpr (Rule::kNumStates > 2) prefetch(m2 + done + kAhead);
      }
      for (int64_t j = done; j < done + kBlock; ++j) element(s, p, g, m0, m1, m2, j);
    }
    for (; done < count; ++done) element(s, p, g, m0, m1, m2, done);
  }

 private:
  static MLSYS_INLINE void prefetch(const float* block) {
    for (size_t byte = 0; byte < kBlock * sizeof(float); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(block) + byte);
    }
  }

  static MLSYS_INLINE void element(const typename Rule::Scalars& s, float* __restrict p,
                                   const float* __restrict g, float* __restrict m0, float* __restrict m1,
                                   float* __restrict m2, int64_t i) {
    float value = p[i];
    float state[kMaxStates] = {0.0f, 0.0f, 0.0f};
    if constexpr (Rule::kNumStates > 0) state[0] = m0[i];
    if constexpr (Rule::kNumStates > 1) state[1] = m1[i];
    if constexpr (Rule::kNumStates > 2) state[2] = m2[i];
    Rule::update(s, kOnlyParam<Rule> ? 0.0f : g[i], value, state);
    p[i] = value;
    if constexpr (kOnlyParam<Rule>) return;
    if constexpr (Rule::kNumStates > 0) m0[i] = state[0];
    if constexpr (Rule::kNumStates > 1) m1[i] = state[1];
    if constexpr (Rule::kNumStates > 2) m2[i] = state[2];
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

// What is known of the elements of a segment: computed once for neighbours that agree.
template <class Rule>
struct Prepared {
  int64_t row = -1;
  float step = -1.0f;
  typename Rule::Scalars scalars{};

  void prepare(const StepArguments& args, const Segment& segment) {
    if (segment.hyper_row == row && args.steps[segment.step_index] == step) return;
    row = segment.hyper_row;
    step = args.steps[segment.step_index];
    scalars = Rule::prepare(args.hyper + row * kHyperColumns, step, args.grad_scale);
  }
};

// In place and in one go: all arrays are float32.
template <class Rule>
void step_plain(const typename Rule::Scalars& scalars, const Segment& s, int64_t begin, int64_t end) {
  const auto run = [&]<bool kPrefetch>() {
    const RuleLoop<Rule, kPrefetch> loop{
        scalars,
        s.pointer<float>(s.param),
        s.pointer<const float>(s.grad),
        {s.pointer<float>(s.state[0]), s.pointer<float>(s.state[1]), s.pointer<float>(s.state[2])}};
    run_simd(simd_level(), loop, begin, end);
  };
  prefetch_pays() ? run.template operator()<true>() : run.template operator()<false>();
}

// Block by block through the cache, for every other form.
template <class Rule>
void step_stored(const typename Rule::Scalars& scalars, BlockOperands& operands, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; block += BlockOperands::kBlock) {
    const int64_t count = std::min(BlockOperands::kBlock, end - block);
    operands.load(block, count);
    const RuleLoop<Rule, false> loop{scalars,
                                     operands.param(),
                                     operands.grad(),
                                     {operands.state(0), operands.state(1), operands.state(2)}};
    run_simd(simd_level(), loop, int64_t{0}, count);
    operands.store();
  }
}

// The forms that a rule has one loop for; none unless fused_forms.h says so.
template <class Rule>
struct FusedForms {
  static bool step(const typename Rule::Scalars&, const Segment&, double, int64_t, int64_t) { return false; }
};

template <class Rule>
void step_stretch(const StepArguments& args, const typename Rule::Scalars& scalars, const Segment& segment,
                  int64_t begin, int64_t end) {
  if (segment.is_plain()) return step_plain<Rule>(scalars, segment, begin, end);
  if (FusedForms<Rule>::step(scalars, segment, args.steps[segment.step_index], begin, end)) return;
  BlockOperands operands(segment, Rule::kNumStates, args.steps[segment.step_index],
                         args.hyper[segment.hyper_row * kHyperColumns + kAverageDecay]);
  step_stored<Rule>(scalars, operands, begin, end);
}

// Calls visit.operator()<Rule>() for the rule of the family that has this number of states; false if none
// has.
template <class First, class... Others, class Visit>
bool with_rule(int num_states, Visit&& visit) {
  if (First::kNumStates == num_states) {
    visit.template operator()<First>();
    return true;
  }
  if constexpr (sizeof...(Others) > 0) {
    return with_rule<Others...>(num_states, visit);
  } else {
    return false;
  }
}

template <class... Rules>
void check_states(const StepArguments& args) {
  for (int64_t i = 0; i < args.num_segments; ++i) {
    if (args.segments[i].numel == 0) continue;  // nothing has no address
    const int num_states = args.segments[i].num_states();
    if (((Rules::kNumStates != num_states) && ...)) {
      throw std::invalid_argument("step: segment " + std::to_string(i) + " has " +
                                  std::to_string(num_states) +
                                  " moments. No form of this rule has as many. Build the table with "
                                  "mlsys_engine.optim.segments.");
    }
  }
}

template <class First, class... Others>
void step_segments(const StepArguments& args) {
  if (args.num_segments == 0) return;
  check_states<First, Others...>(args);
  const Segment& last = args.segments[args.num_segments - 1];
  simd_level();  // throws for a bad MLSYS_SIMD here and not inside the pool
  parallel_for(args.pool, last.first_chunk + num_chunks(last.numel), 8, [&](int64_t first, int64_t stop) {
    Prepared<First> prepared;
    visit_chunks(args.segments, args.num_segments, first, stop,
                 [&](const Segment& segment, int64_t begin, int64_t end) {
                   prepared.prepare(args, segment);
                   with_rule<First, Others...>(segment.num_states(), [&]<class Rule>() {
                     step_stretch<Rule>(args, prepared.scalars, segment, begin, end);
                   });
                 });
  });
}

}  // namespace mlsys
