#include "bindings/activation/frame_chain.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace mlsys::activation {

FrameChain::FrameChain(std::vector<bool> linked, std::vector<std::vector<FrameChainStep>> before)
    : linked_(std::move(linked)), before_(std::move(before)) {
  if (linked_.size() != before_.size())
    throw std::invalid_argument("a chain with lists of different lengths");
  for (size_t position = 0; position < before_.size(); ++position) {
    const std::vector<FrameChainStep>& steps = before_[position];
    bool sound =
        !steps.empty() && steps.back().position == position && steps.back().keep == Frame::Keep::kSaved;
    for (size_t i = 1; i < steps.size(); ++i) sound = sound && steps[i].position == steps[i - 1].position + 1;
    if (!sound)
      throw std::invalid_argument("a chain whose block " + std::to_string(position) + " is never run");
  }
}

void FrameChain::remember(const std::shared_ptr<Frame>& frame, const std::vector<at::Tensor>& outputs) {
  last_ = frame;
  last_outputs_.clear();
  for (const at::Tensor& output : outputs) last_outputs_.emplace_back(output.getIntrusivePtr());
}

std::shared_ptr<Frame> FrameChain::find_before(size_t position, const std::vector<at::Tensor>& inputs,
                                               std::vector<int64_t>& indices) const {
  std::shared_ptr<Frame> frame = last_.lock();
  if (!frame || frame->position() + 1 != position) return nullptr;
  bool found = false;
  indices.assign(inputs.size(), -1);
  for (size_t i = 0; i < inputs.size(); ++i) {
    for (size_t j = 0; j < last_outputs_.size(); ++j) {
      const auto output = last_outputs_[j].lock();
      if (output && output.get() == inputs[i].unsafeGetTensorImpl()) indices[i] = static_cast<int64_t>(j);
    }
    found = found || indices[i] >= 0;
  }
  return found ? frame : nullptr;
}

}  // namespace mlsys::activation
