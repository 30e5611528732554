// The collectives whose slices have owners between hosts: the canonical tree, and compression. Inside one
// host they are the plain ones, whose order is that tree already and which have nothing to compress.
#include <array>

#include "comm/algorithms/hosts.h"
#include "comm/algorithms/local.h"
#include "comm/engine.h"

namespace mlsys::comm {

void Engine::all_reduce_tree(void* data, size_t count, Reduction reduction, Timeout timeout) {
  const std::lock_guard lock(running_);
  expect_open();
  const Reducer reducer(reduction, options_.size);
  if (options_.size == 1) {
    begin_alone();
    return reducer.reduce(std::array<const void*, 1>{data}, std::array{data}, count);
  }
  Context context = begin_reduction(OpKind::kAllReduceTree, data, count, reduction, timeout);
  if (context.mesh == nullptr) return local_reduce(context, reducer, data, count, -1);
  hosts_reduce_tree(context, reducer, data, count);
  end(context);
}

void Engine::all_reduce_compressed(float* data, size_t count, bool average, Compression compression,
                                   float* residual, Timeout timeout) {
  const std::lock_guard lock(running_);
  expect_open();
  const Reduction reduction{ElementType::kFloat32, average ? ReduceOp::kAvg : ReduceOp::kSum};
  if (options_.size == 1) return begin_alone();
  const auto kind = compression == Compression::kBFloat16 ? OpKind::kAllReduceBf16 : OpKind::kAllReduceInt8;
  Context context = begin_reduction(kind, data, count, reduction, timeout);
  if (context.mesh == nullptr) {
    return local_reduce(context, Reducer(reduction, options_.size), data, count, -1);
  }
  const float divisor = average ? static_cast<float>(options_.size) : 1.0F;
  hosts_reduce_compressed(context, compression, divisor, data, count, residual);
  end(context);
}

void Engine::reduce_scatter_tree(std::span<const void* const> inputs, void* output, size_t count,
                                 Reduction reduction, Timeout timeout) {
  const std::lock_guard lock(running_);
  expect_open();
  expect_entries(inputs.size(), options_.size, "inputs");
  const Reducer reducer(reduction, options_.size);
  if (options_.size == 1) {
    begin_alone();
    return reducer.reduce(inputs, std::array{output}, count);
  }
  Context context = begin_scatter(OpKind::kReduceScatterTree, inputs, count, reduction, timeout);
  if (context.mesh == nullptr) return local_reduce_scatter(context, reducer, inputs, output, count);
  hosts_reduce_scatter_tree(context, reducer, inputs, output, count);
  end(context);
}

}  // namespace mlsys::comm
