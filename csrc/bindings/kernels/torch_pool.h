// The threads of torch's operations, as core/parallel.h asks for them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "core/parallel.h"

namespace mlsys::bindings {

inline void torch_pool(int64_t num_tasks, int64_t grain, ParallelBody body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, num_tasks, grain, body, context));
}

}  // namespace mlsys::bindings
