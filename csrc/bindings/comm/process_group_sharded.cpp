// The sharded updates of the process group, beyond what c10d knows. See mlsys_engine/comm/sharded.py.
#include <utility>

#include "bindings/comm/accelerator_sharded.h"
#include "bindings/comm/failures.h"
#include "bindings/comm/process_group.h"
#include "bindings/comm/reduction.h"
#include "bindings/comm/tensors.h"
#include "optim/segment.h"
#include "optim/tile_step.h"

namespace mlsys::binding {

using c10d::OpType;
using WorkPtr = ProcessGroupMlsys::WorkPtr;

namespace {

constexpr std::chrono::milliseconds kGroupTimeout{-1};

void check_flat_float(const at::Tensor& tensor, const char* name, const Where& where) {
  if (tensor.dim() == 1 && tensor.is_contiguous() && tensor.scalar_type() == at::kFloat) return;
  throw Refused(where + " was given " + name + " of " + std::to_string(tensor.dim()) +
                    " dimensions and dtype " + c10::toString(tensor.scalar_type()) + ".",
                "A contiguous 1-d float32 tensor is expected.",
                "Allocate it with mls.comm.empty(numel, dtype=torch.float32).");
}

[[noreturn]] void refuse_table(const Where& where, const std::string& given) {
  throw Refused(
      where + " was given " + given + ".",
      "A table of the optimizer's segments, sorted by parameter and inside the parameters, is expected.",
      "Build it with mlsys_engine.optim.sharded.");
}

// Every address that the kernel will follow lies in memory that the caller's tensors keep alive; of the
// moments' only the caller knows.
void check_table(const OptimizerTable& table, const at::Tensor& parameters, const Where& where) {
  const at::Tensor& rows = table.segments;
  if (!rows.is_contiguous() || rows.scalar_type() != at::kLong || rows.dim() != 2 ||
      rows.size(1) != kSegmentColumns || table.hyper.scalar_type() != at::kDouble ||
      !table.hyper.is_contiguous() || table.hyper.dim() != 2 || table.hyper.size(1) != kHyperColumns ||
      table.steps.scalar_type() != at::kFloat || !table.steps.is_contiguous()) {
    refuse_table(where, "a segment table, hyper-parameters or step counts of another type or shape");
  }
  auto previous = static_cast<int64_t>(reinterpret_cast<uintptr_t>(parameters.const_data_ptr()));
  const int64_t end = previous + static_cast<int64_t>(parameters.nbytes());
  const auto* segments = reinterpret_cast<const Segment*>(rows.const_data_ptr<int64_t>());
  for (int64_t i = 0; i < rows.size(0); ++i) {
    const Segment& s = segments[i];
    const int64_t stop = s.param + s.numel * static_cast<int64_t>(sizeof(float));
    if (s.param < previous || s.numel < 0 || stop > end || s.hyper_row < 0 ||
        s.hyper_row >= table.hyper.size(0) || s.step_index < 0 || s.step_index >= table.steps.numel() ||
        !s.is_plain()) {
      refuse_table(where, "a segment table whose row " + std::to_string(i) + " is out of place");
    }
    previous = stop;
  }
}

}  // namespace

WorkPtr ProcessGroupMlsys::reduce_shard(const at::Tensor& data, std::vector<size_t> partition,
                                        const at::Tensor& chunks, const at::Tensor& sums, bool async) {
  constexpr Call kCall{OpType::UNKNOWN, "reduce_shard", "mlsys:reduce_shard"};
  const auto here = where(kCall.name);
  if (auto* backend = elsewhere(kCall, data)) {
    check_flat_float(data, "data", here);
    if (chunks.defined()) {
      throw Refused(here + " was given chunks and a tensor on " + data.device().str() + ".",
                    "Squares are taken on the way of CPU tensors alone.",
                    "Wait for the Work, then call mlsys_engine.optim.squares_of_chunks.");
    }
    return reduce_rows(*backend, data, rows_of(data, partition, getSize(), here));
  }
  check_tensor(data, here);
  check_flat_float(data, "data", here);
  if (chunks.defined()) {
    const int64_t count = chunks.numel() / 3;
    bool ok = chunks.scalar_type() == at::kLong && chunks.is_contiguous() && chunks.numel() % 3 == 0 &&
              sums.defined() && sums.scalar_type() == at::kDouble && sums.is_contiguous();
    const auto* row = ok ? chunks.const_data_ptr<int64_t>() : nullptr;
    for (int64_t i = 0; ok && i < count; ++i, row += 3) {
      ok = row[0] >= 0 && row[1] >= 0 && row[0] + row[1] <= data.numel() && row[2] >= 0 &&
           row[2] < sums.numel();
    }
    if (!ok) {
      throw Refused(here + " was given chunks that do not fit the data or the sums.",
                    "int64 rows of (first, count, place) and float64 sums are expected.",
                    "Build them with mlsys_engine.optim.sharded.");
    }
  }
  return enqueue(kCall, {data}, {data}, kGroupTimeout, async,
                 reduce_shard_body(data, comm::Reduction{comm::ElementType::kFloat32}, std::move(partition),
                                   chunks, sums));
}

WorkPtr ProcessGroupMlsys::fused_step(const at::Tensor& gradients, const at::Tensor& parameters,
                                      std::vector<size_t> partition, bool is_reduced, OptimizerTable table,
                                      bool async) {
  constexpr Call kCall{OpType::UNKNOWN, "reduce_scatter_optimize_all_gather",
                       "mlsys:reduce_scatter_optimize_all_gather"};
  const auto here = where(kCall.name);
  check_tensor(gradients, here);
  check_tensor(parameters, here);
  check_flat_float(gradients, "gradients", here);
  check_flat_float(parameters, "parameters", here);
  if (gradients.numel() != parameters.numel()) {
    throw Refused(here + " was given " + std::to_string(gradients.numel()) + " gradients and " +
                      std::to_string(parameters.numel()) + " parameters.",
                  "As many of one as of the other are expected.", "Lay both out alike.");
  }
  check_table(table, parameters, here);
  if (make_tile_step(table.rule, {}) == nullptr) {
    throw Refused(here + " was given the rule \"" + table.rule + "\".",
                  "A rule of mlsys_engine.optim that works element by element is expected.",
                  "Use adamw or sgd.");
  }
  return enqueue(kCall, {gradients, parameters}, {parameters}, kGroupTimeout, async,
                 fused_step_body(gradients, parameters, comm::Reduction{comm::ElementType::kFloat32},
                                 std::move(partition), is_reduced, std::move(table)));
}

WorkPtr ProcessGroupMlsys::share_shards(const at::Tensor& data, std::vector<size_t> partition, bool async) {
  constexpr Call kCall{OpType::UNKNOWN, "share_shards", "mlsys:share_shards"};
  const auto here = where(kCall.name);
  if (auto* backend = elsewhere(kCall, data)) {
    check_flat_float(data, "data", here);
    return share_rows(*backend, data, rows_of(data, partition, getSize(), here));
  }
  check_tensor(data, here);
  check_flat_float(data, "data", here);
  for (size_t& bound : partition) bound *= sizeof(float);  // as bytes, which move unchanged
  return enqueue(kCall, {data}, {data}, kGroupTimeout, async, share_shards_body(data, std::move(partition)));
}

}  // namespace mlsys::binding
