// The operands of a step as floats, a block at a time, whatever form they are stored in.
//
// A rule computes in float and knows nothing of storage. What is stored as float32 it reads and writes in
// place; everything else is unpacked into a block that stays in the first-level cache, and packed again after
// the rule. So a form of storage is written once, for all rules. Weights are averaged and gradients zeroed
// in the same visit. Reference: mlsys_engine/optim/reference_storage.py; tests: tests/optim/test_storage.py.
#pragma once

#include <array>
#include <cstdint>

#include "core/cpu.h"
#include "optim/codes.h"
#include "optim/segment.h"

namespace mlsys {

class BlockOperands {
 public:
  // A whole number of code blocks; the eleven kilobytes of all buffers leave room for what is read and
  // written.
  static constexpr int64_t kBlock = 256;

  // `average_decay` as in the hyper-parameters; `step` and the segment's key decide the random numbers.
  BlockOperands(const Segment& segment, int num_states, double step, double average_decay);

  // Makes elements [begin, begin + count) ready; count is at most kBlock, begin a multiple of kCodeBlock.
  void load(int64_t begin, int64_t count);
  // Puts back what the rule has changed of the elements loaded last: parameters and moments.
  void store();
  // The same, of moments alone.
  void store_states();

  float* param() const { return param_; }
  const float* grad() const { return grad_; }
  float* state(int index) const { return states_[static_cast<size_t>(index)]; }

 private:
  using Buffer = std::array<float, kBlock>;
  using Draws = std::array<uint32_t, kBlock>;

  void load_param();
  void load_grad();
  void load_state(int index);
  void store_param();
  void store_state(int index);
  const uint32_t* draws(uint32_t stream);

  const Segment& segment_;
  const Format format_;
  const int num_states_;
  const double step_;
  const float average_rest_;  // 1 - decay
  const SimdLevel level_;
  int64_t begin_ = 0, count_ = 0;
  float* param_ = nullptr;
  const float* grad_ = nullptr;
  std::array<float*, kMaxStates> states_{};
  int drawn_ = -1;  // the stream that draws_ holds for this block
  alignas(64) Buffer param_buffer_;
  alignas(64) Buffer grad_buffer_;
  alignas(64) std::array<Buffer, kMaxStates> state_buffers_;
  alignas(64) Draws draws_;
};

}  // namespace mlsys
