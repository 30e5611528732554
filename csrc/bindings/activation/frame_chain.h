// What the frames of a model's blocks run before each block's backward, when a schedule spans several blocks.
//
// A block's frame is linked to the frame before it when the schedule keeps nothing between the two and its
// input is that block's output, the very tensor. Then the parent's code between the blocks is known to be no
// computation, and the blocks can be run one after the other.
#pragma once

#include <c10/core/TensorImpl.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "bindings/activation/frame.h"

namespace mlsys::activation {

struct FrameChainStep {
  size_t position;
  Frame::Keep keep;
};

class FrameChain {
 public:
  // `linked[i]`: block i keeps no input of its own. `before[i]`: the runs before the backward of block i,
  // blocks in ascending order without gaps, the last one being block i with all that it saves.
  FrameChain(std::vector<bool> linked, std::vector<std::vector<FrameChainStep>> before);

  bool linked(size_t position) const { return position < linked_.size() && linked_[position]; }
  const std::vector<FrameChainStep>& before(size_t position) const { return before_[position]; }

  // The frame and outputs of the call that went before; they belong together. `outputs` are compared by
  // identity.
  void remember(const std::shared_ptr<Frame>& frame, const std::vector<at::Tensor>& outputs);
  // The frame before `position` if these are its outputs (at least one of them), with their indices; or null.
  std::shared_ptr<Frame> find_before(size_t position, const std::vector<at::Tensor>& inputs,
                                     std::vector<int64_t>& indices) const;

 private:
  std::vector<bool> linked_;
  std::vector<std::vector<FrameChainStep>> before_;
  std::weak_ptr<Frame> last_;
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> last_outputs_;
};

}  // namespace mlsys::activation
