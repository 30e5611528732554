// The collectives of the process group that move bytes without changing them: any dtype.
#include <algorithm>
#include <numeric>

#include "bindings/comm/failures.h"
#include "bindings/comm/process_group.h"
#include "bindings/comm/tensors.h"

namespace mlsys::binding {

using c10d::OpType;
using WorkPtr = ProcessGroupMlsys::WorkPtr;

namespace {

void check_flat(const at::Tensor& output, const at::Tensor& input, int size, const Where& where) {
  check_tensor(input, where);
  check_tensor(output, where);
  if (output.scalar_type() == input.scalar_type() && output.numel() == input.numel() * size) return;
  throw Refused(where + " was given an input of " + std::to_string(input.numel()) +
                    " elements and an output of " + std::to_string(output.numel()) + ".",
                "The output needs the input's dtype and " + std::to_string(size) + " times its elements.",
                "Allocate torch.empty(world_size * input.numel(), dtype=input.dtype).");
}

void check_lists(const std::vector<Tensors>& lists, size_t count, const Where& where) {
  if (lists.size() == count) return;
  throw Refused(where + " was given " + std::to_string(lists.size()) + " lists of tensors.",
                std::to_string(count) + " is expected here: only the root has one in gather and scatter.",
                "Pass None on the other ranks.");
}

// One entry a rank; equal parts when none are given. Must cover dim 0 exactly.
std::vector<int64_t> complete_splits(const at::Tensor& tensor, const std::vector<int64_t>& splits, int size,
                                     const Where& where) {
  check_tensor(tensor, where);
  const int64_t rows = tensor.dim() == 0 ? 0 : tensor.size(0);
  auto complete = splits.empty() ? std::vector<int64_t>(size, rows / size) : splits;
  const bool covered = std::accumulate(complete.begin(), complete.end(), int64_t{0}) == rows;
  const bool positive =
      std::all_of(complete.begin(), complete.end(), [](int64_t split) { return split >= 0; });
  if (tensor.dim() > 0 && covered && positive && complete.size() == static_cast<size_t>(size))
    return complete;
  throw Refused(where + " was given splits that do not cover a tensor of " + std::to_string(rows) + " rows.",
                splits.empty()
                    ? "Tensor's dim 0 does not divide equally across group size " + std::to_string(size) + "."
                    : "Number of tensor splits not equal to group size, or split sizes doesn't match total "
                      "dim 0 size.",
                "Give one split for each rank that together make up dim 0.");
}

}  // namespace

WorkPtr ProcessGroupMlsys::broadcast(std::vector<at::Tensor>& tensors,
                                     const c10d::BroadcastOptions& options) {
  constexpr Call kCall{OpType::BROADCAST, "broadcast", "mlsys:broadcast"};
  if (auto* backend = elsewhere(kCall, tensors)) return backend->broadcast(tensors, options);
  const auto here = where(kCall.name);
  const auto& tensor = the_one(tensors, here);
  return enqueue(kCall, tensors, tensors, options.timeout, options.asyncOp,
                 broadcast_from(tensor, checked_root(options.rootRank, here)));
}

WorkPtr ProcessGroupMlsys::allgather(TensorLists& outputs, std::vector<at::Tensor>& inputs,
                                     const c10d::AllgatherOptions& options) {
  constexpr Call kCall{OpType::ALLGATHER, "all_gather", "mlsys:all_gather"};
  if (auto* backend = elsewhere(kCall, outputs, inputs)) return backend->allgather(outputs, inputs, options);
  const auto here = where(kCall.name);
  const auto& input = the_one(inputs, here);
  check_lists(outputs, 1, here);
  check_alike(input, outputs[0], getSize(), here);
  return enqueue(kCall, inputs, outputs[0], options.timeout, options.asyncOp,
                 all_gather_lists(inputs, outputs));
}

WorkPtr ProcessGroupMlsys::_allgather_base(at::Tensor& output, at::Tensor& input,
                                           const c10d::AllgatherOptions& options) {
  constexpr Call kCall{OpType::_ALLGATHER_BASE, "all_gather_into_tensor", "mlsys:_all_gather_base"};
  if (auto* backend = elsewhere(kCall, output, input))
    return backend->_allgather_base(output, input, options);
  check_flat(output, input, getSize(), where(kCall.name));
  return enqueue(kCall, {input}, {output}, options.timeout, options.asyncOp,
                 all_gather_flat({input}, {output}));
}

// c10d passes for each rank a list of one output for each input; turned here into one list of ranks an input.
WorkPtr ProcessGroupMlsys::allgather_coalesced(TensorLists& outputs, std::vector<at::Tensor>& inputs,
                                               const c10d::AllgatherOptions& options) {
  constexpr Call kCall{OpType::ALLGATHER_COALESCED, "all_gather_coalesced", "mlsys:all_gather"};
  if (auto* backend = elsewhere(kCall, outputs, inputs)) {
    return backend->allgather_coalesced(outputs, inputs, options);
  }
  const auto here = where(kCall.name);
  check_lists(outputs, getSize(), here);
  std::vector<Tensors> by_input(inputs.size());
  Tensors flat;
  for (const auto& of_rank : outputs) {
    if (of_rank.size() != inputs.size()) {
      throw Refused(here + " was given " + std::to_string(inputs.size()) + " inputs and a list of " +
                        std::to_string(of_rank.size()) + " outputs.",
                    "invalid output tensor list: each rank's needs one tensor for each input.",
                    "Make them as many.");
    }
    for (size_t i = 0; i < inputs.size(); ++i) by_input[i].push_back(of_rank[i]);
    flat.insert(flat.end(), of_rank.begin(), of_rank.end());
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_tensor(inputs[i], here);
    check_alike(inputs[i], by_input[i], getSize(), here);
  }
  return enqueue(kCall, inputs, flat, options.timeout, options.asyncOp,
                 all_gather_lists(inputs, std::move(by_input)));
}

WorkPtr ProcessGroupMlsys::allgather_into_tensor_coalesced(std::vector<at::Tensor>& outputs,
                                                           std::vector<at::Tensor>& inputs,
                                                           const c10d::AllgatherOptions& options) {
  constexpr Call kCall{OpType::ALLGATHER_COALESCED, "all_gather_into_tensor_coalesced",
                       "mlsys:all_gather_into_tensor_coalesced"};
  if (auto* backend = elsewhere(kCall, outputs, inputs)) {
    return backend->allgather_into_tensor_coalesced(outputs, inputs, options);
  }
  const auto here = where(kCall.name);
  if (outputs.size() != inputs.size()) {
    throw Refused(here + " was given " + std::to_string(inputs.size()) + " inputs and " +
                      std::to_string(outputs.size()) + " outputs.",
                  "As many outputs as inputs are needed.", "Pair them up.");
  }
  for (size_t i = 0; i < inputs.size(); ++i) check_flat(outputs[i], inputs[i], getSize(), here);
  return enqueue(kCall, inputs, outputs, options.timeout, options.asyncOp, all_gather_flat(inputs, outputs));
}

WorkPtr ProcessGroupMlsys::gather(TensorLists& outputs, std::vector<at::Tensor>& inputs,
                                  const c10d::GatherOptions& options) {
  constexpr Call kCall{OpType::GATHER, "gather", "mlsys:gather"};
  if (auto* backend = elsewhere(kCall, outputs, inputs)) return backend->gather(outputs, inputs, options);
  const auto here = where(kCall.name);
  const auto& input = the_one(inputs, here);
  const int root = checked_root(options.rootRank, here);
  check_lists(outputs, root == getRank() ? 1 : 0, here);
  Tensors mine;
  if (root == getRank()) {
    check_alike(input, outputs[0], getSize(), here);
    mine = outputs[0];
  }
  return enqueue(kCall, inputs, mine, options.timeout, options.asyncOp, gather_to(input, mine, root));
}

WorkPtr ProcessGroupMlsys::scatter(std::vector<at::Tensor>& outputs, TensorLists& inputs,
                                   const c10d::ScatterOptions& options) {
  constexpr Call kCall{OpType::SCATTER, "scatter", "mlsys:scatter"};
  if (auto* backend = elsewhere(kCall, outputs, inputs)) return backend->scatter(outputs, inputs, options);
  const auto here = where(kCall.name);
  const auto& output = the_one(outputs, here);
  const int root = checked_root(options.rootRank, here);
  check_lists(inputs, root == getRank() ? 1 : 0, here);
  Tensors mine;
  if (root == getRank()) {
    check_alike(output, inputs[0], getSize(), here);
    mine = inputs[0];
  }
  return enqueue(kCall, mine, outputs, options.timeout, options.asyncOp, scatter_from(mine, output, root));
}

WorkPtr ProcessGroupMlsys::alltoall(std::vector<at::Tensor>& outputs, std::vector<at::Tensor>& inputs,
                                    const c10d::AllToAllOptions& options) {
  constexpr Call kCall{OpType::ALLTOALL, "all_to_all", "mlsys:all_to_all"};
  if (auto* backend = elsewhere(kCall, outputs, inputs)) return backend->alltoall(outputs, inputs, options);
  const auto here = where(kCall.name);
  const auto size = static_cast<size_t>(getSize());
  if (inputs.size() != size || outputs.size() != size) {
    throw Refused(here + " was given " + std::to_string(inputs.size()) + " inputs and " +
                      std::to_string(outputs.size()) + " outputs.",
                  "One input and one output for each of the " + std::to_string(size) + " ranks are needed.",
                  "Use an empty tensor for a rank that gets nothing.");
  }
  check_tensors(inputs, here);
  check_tensors(outputs, here);
  return enqueue(kCall, inputs, outputs, options.timeout, options.asyncOp, all_to_all_lists(inputs, outputs));
}

WorkPtr ProcessGroupMlsys::alltoall_base(at::Tensor& output, at::Tensor& input,
                                         std::vector<int64_t>& output_splits,
                                         std::vector<int64_t>& input_splits,
                                         const c10d::AllToAllOptions& options) {
  constexpr Call kCall{OpType::ALLTOALL_BASE, "all_to_all_single", "mlsys:all_to_all"};
  if (auto* backend = elsewhere(kCall, output, input)) {
    return backend->alltoall_base(output, input, output_splits, input_splits, options);
  }
  const auto here = where(kCall.name);
  auto sent = complete_splits(input, input_splits, getSize(), here);
  auto received = complete_splits(output, output_splits, getSize(), here);
  return enqueue(kCall, {input}, {output}, options.timeout, options.asyncOp,
                 all_to_all_flat(input, std::move(sent), output, std::move(received)));
}

WorkPtr ProcessGroupMlsys::barrier(const c10d::BarrierOptions& options) {
  constexpr Call kCall{OpType::BARRIER, "barrier", "mlsys:barrier"};
  if (auto* backend = elsewhere_for_barrier(kCall, options)) return backend->barrier(options);
  return enqueue(
      kCall, {}, {}, options.timeout, options.asyncOp,
      [](comm::Communicator& group, std::chrono::milliseconds timeout) { group.barrier(timeout); });
}

void ProcessGroupMlsys::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  constexpr Call kCall{OpType::BARRIER, "monitored_barrier", "mlsys:monitored_barrier"};
  // A timeout of zero is an explicit one here (c10d's unset value is -1): nobody can come in no time.
  const auto timeout =
      options.timeout == std::chrono::milliseconds(0) ? std::chrono::milliseconds(1) : options.timeout;
  enqueue(kCall, {}, {}, timeout, false, monitored_barrier(monitored_++, wait_all_ranks))->wait();
}

}  // namespace mlsys::binding
