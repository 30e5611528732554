// What each collective does on the group's worker: from checked tensors to the core's pointers and back.
//
// A body runs later than the call, after the operations before it, so it reads and copies only then.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace mlsys::binding {

using Body = std::function<void(comm::Communicator&, std::chrono::milliseconds timeout)>;
using Tensors = std::vector<at::Tensor>;

// bodies_reduce.cpp
Body all_reduce_each(Tensors tensors, std::vector<comm::Reduction> reductions);
Body reduce_to_root(at::Tensor tensor, comm::Reduction reduction, int root);
Body reduce_scatter_lists(std::vector<Tensors> inputs, Tensors outputs, comm::Reduction reduction);
// inputs[i] holds one equal part for each rank, in rank order.
Body reduce_scatter_flat(Tensors inputs, Tensors outputs, std::vector<comm::Reduction> reductions);

// bodies_move.cpp
Body broadcast_from(at::Tensor tensor, int root);
Body all_gather_lists(Tensors inputs, std::vector<Tensors> outputs);
// outputs[i] receives every rank's inputs[i] in rank order.
Body all_gather_flat(Tensors inputs, Tensors outputs);
Body gather_to(at::Tensor input, Tensors outputs, int root);
Body scatter_from(Tensors inputs, at::Tensor output, int root);
Body all_to_all_lists(Tensors inputs, Tensors outputs);
// Splits count rows (steps of dim 0), one entry a rank; both buffers whole.
Body all_to_all_flat(at::Tensor input, std::vector<int64_t> input_splits, at::Tensor output,
                     std::vector<int64_t> output_splits);

// bodies_sparse.cpp
Body all_reduce_sparse(at::Tensor tensor);

// bodies_barrier.cpp
// A barrier at which rank 0 notices who does not come: the first missing rank, or with `name_all` every one.
// `number` counts the monitored barriers of the group and keeps their messages apart.
Body monitored_barrier(uint64_t number, bool name_all);

// bodies_sharded.cpp
// A rule of csrc/optim and what it works on; the tensors keep alive what the segments' addresses name.
struct OptimizerTable {
  std::string rule;
  at::Tensor segments;  // int64 [n, kSegmentColumns]
  at::Tensor hyper;     // float64 [groups, kHyperColumns]
  at::Tensor steps;     // float32
  double grad_scale = 1.0;
};
// `chunks` and `sums` may be undefined: then no squares are summed.
Body reduce_shard_body(at::Tensor data, comm::Reduction reduction, std::vector<size_t> partition,
                       at::Tensor chunks, at::Tensor sums);
Body fused_step_body(at::Tensor gradients, at::Tensor parameters, comm::Reduction reduction,
                     std::vector<size_t> partition, bool is_reduced, OptimizerTable table);
// `partition` in bytes: every rank gets what each owns.
Body share_shards_body(at::Tensor data, std::vector<size_t> partition);

}  // namespace mlsys::binding
