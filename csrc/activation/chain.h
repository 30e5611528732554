// A chain of blocks as the budget solver sees it, and the schedules that it finds. Times in seconds, sizes in
// bytes. The same values with readable printing: mlsys_engine/activation/chain.py.
#pragma once

#include <cstdint>
#include <vector>

namespace mlsys::activation {

// One way to run a block so that its backward can follow: what it takes, and what stays in between.
struct OptionCosts {
  double forward_s = 0;
  double backward_s = 0;            // with whatever the option computes or moves again
  int64_t saved_bytes = 0;          // from the forward to the backward: the output, but not the input
  int64_t forward_peak_bytes = 0;   // while the step runs, besides the block's input; at least saved_bytes
  int64_t backward_peak_bytes = 0;  // likewise, with the gradients of the output and of the input
};

struct BlockCosts {
  int64_t input_bytes = 0;  // the first block's input is always there and costs no budget
  // False: the input is no other block's output, so it is stored on its own as soon as it exists.
  bool splittable = true;
  double drop_forward_s = 0;          // a forward of which only the output is wanted
  int64_t drop_peak_bytes = 0;        // while that runs, output included, besides the block's input
  int64_t output_gradient_bytes = 0;  // waits while blocks in front of this one's end are run again
  std::vector<OptionCosts> options;   // at least one
};

using Chain = std::vector<BlockCosts>;

enum class Action : int32_t {
  kDrop,        // forward; neither the input nor anything else stays
  kCheckpoint,  // forward; the input stays until the block's backward
  kOption,      // forward; the input and what the option saves stay until the block's backward
  kBackward,
};

struct Step {
  Action action;
  int32_t block;
  int32_t option;  // -1 unless the action is kOption
};

struct Schedule {
  std::vector<Step> steps;  // empty: no schedule fits the budget
  double seconds = 0;
  int64_t peak_bytes = 0;
};

}  // namespace mlsys::activation
