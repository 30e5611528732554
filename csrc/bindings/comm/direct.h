// The calls that mls.comm makes past torch's dispatcher, for the shortest way from Python to the core.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "bindings/comm/process_group.h"

namespace mlsys::binding {

using ProcessGroupClass = pybind11::class_<ProcessGroupMlsys, c10::intrusive_ptr<ProcessGroupMlsys>>;

// Adds all_reduce_now and its like. Each returns true when the operation is done, and false, with nothing
// sent, when the call is not a plain one: torch.distributed then makes it, or refuses it in its own words.
// Plain are dense contiguous CPU tensors of fitting sizes that need no gradient, outside of every mode that
// wants to see or rewrite the call. What fails once it has begun throws as Work.wait() does.
void define_direct_calls(ProcessGroupClass& process_group);

}  // namespace mlsys::binding
