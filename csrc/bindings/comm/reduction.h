// From torch's dtype and ReduceOp to the core's Reduction.
#pragma once

#include <ATen/core/Tensor.h>

#include <torch/csrc/distributed/c10d/Types.hpp>

#include "bindings/comm/where.h"
#include "comm/communicator.h"

namespace mlsys::binding {

// Throws Refused, listing what is supported, for a dtype or operation that does not reduce. A complex tensor
// reduces as its real and imaginary parts.
comm::Reduction reduction_for(const at::Tensor& tensor, const c10d::ReduceOp& op, const Where& where);

// Numbers of the reduction's element type in `tensor`: two for each complex element.
size_t num_reduced(const at::Tensor& tensor);

}  // namespace mlsys::binding
