// The sharded updates: here the collective meets the optimizer's rule.
#include <utility>

#include "bindings/comm/bodies.h"
#include "optim/launch.h"
#include "optim/tile_step.h"

namespace mlsys::binding {

using comm::Communicator;
using comm::Reduction;
using std::chrono::milliseconds;

namespace {

// Adds up squares chunk by chunk as reduced elements come in. A chunk that a tile cuts waits for its end: the
// reduction is stored, so its beginning can still be read.
class ChunkSums {
 public:
  // `chunks`: int64 [n, 3], rows of first element, number of elements and place in `sums`, in ascending
  // order.
  ChunkSums(const float* data, const at::Tensor& chunks, const at::Tensor& sums)
      : data_(data),
        row_(chunks.const_data_ptr<int64_t>()),
        end_(row_ + chunks.numel()),
        sums_(sums.mutable_data_ptr<double>()) {}

  void advance(int64_t reduced_to) {
    for (; row_ != end_ && row_[0] + row_[1] <= reduced_to; row_ += 3) {
      sums_[row_[2]] = chunk_sum_of_squares(data_ + row_[0], row_[1]);
    }
  }

 private:
  const float* data_;
  const int64_t* row_;
  const int64_t* end_;
  double* sums_;
};

}  // namespace

Body reduce_shard_body(at::Tensor data, Reduction reduction, std::vector<size_t> partition, at::Tensor chunks,
                       at::Tensor sums) {
  return [data = std::move(data), reduction, partition = std::move(partition), chunks = std::move(chunks),
          sums = std::move(sums)](Communicator& group, milliseconds timeout) {
    void* memory = data.mutable_data_ptr();
    if (!chunks.defined()) {
      return group.reduce_shard(
          memory, data.numel(), reduction, partition, [](const void*, size_t, size_t) {}, timeout);
    }
    ChunkSums squares(static_cast<const float*>(memory), chunks, sums);
    group.reduce_shard(
        memory, data.numel(), reduction, partition,
        [&](const void*, size_t first, size_t count) {
          squares.advance(static_cast<int64_t>(first + count));
        },
        timeout);
  };
}

Body fused_step_body(at::Tensor gradients, at::Tensor parameters, Reduction reduction,
                     std::vector<size_t> partition, bool is_reduced, OptimizerTable table) {
  return [gradients = std::move(gradients), parameters = std::move(parameters), reduction,
          partition = std::move(partition), is_reduced,
          table = std::move(table)](Communicator& group, milliseconds timeout) {
    const StepArguments arguments{reinterpret_cast<const Segment*>(table.segments.const_data_ptr<int64_t>()),
                                  table.segments.size(0),
                                  table.hyper.const_data_ptr<double>(),
                                  table.steps.const_data_ptr<float>(),
                                  table.grad_scale,
                                  run_inline};
    const auto rule = make_tile_step(table.rule, arguments);
    auto* memory = static_cast<float*>(parameters.mutable_data_ptr());
    group.reduce_scatter_optimize_all_gather(
        gradients.const_data_ptr(), memory, parameters.numel(), reduction, partition, is_reduced,
        [&](const void* reduced, size_t first, size_t count) {
          rule->step(static_cast<const float*>(reduced), memory + first, static_cast<int64_t>(count));
        },
        timeout);
  };
}

Body share_shards_body(at::Tensor data, std::vector<size_t> partition) {
  return
      [data = std::move(data), partition = std::move(partition)](Communicator& group, milliseconds timeout) {
        const Reduction bytes{comm::ElementType::kUInt8};
        group.reduce_scatter_optimize_all_gather(
            data.const_data_ptr(), data.mutable_data_ptr(), data.nbytes(), bytes, partition,
            /*is_reduced=*/true, [](const void*, size_t, size_t) {}, timeout);
      };
}

}  // namespace mlsys::binding
