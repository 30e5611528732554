// The reducing collectives of the process group.
#include "bindings/comm/failures.h"
#include "bindings/comm/process_group.h"
#include "bindings/comm/reduction.h"
#include "bindings/comm/tensors.h"

namespace mlsys::binding {

using c10d::OpType;
using WorkPtr = ProcessGroupMlsys::WorkPtr;

namespace {

std::vector<comm::Reduction> reductions_for(const Tensors& tensors, const c10d::ReduceOp& op,
                                            const Where& where) {
  std::vector<comm::Reduction> reductions;
  for (const auto& tensor : tensors) reductions.push_back(reduction_for(tensor, op, where));
  return reductions;
}

}  // namespace

WorkPtr ProcessGroupMlsys::allreduce(std::vector<at::Tensor>& tensors,
                                     const c10d::AllreduceOptions& options) {
  constexpr Call kCall{OpType::ALLREDUCE, "all_reduce", "mlsys:all_reduce"};
  if (auto* backend = elsewhere(kCall, tensors)) {
    if (auto work = small_all_reduce(tensors, options)) return work;
    return backend->allreduce(tensors, options);
  }
  const auto here = where(kCall.name);
  if (tensors.size() == 1 && tensors[0].layout() == at::kSparse && tensors[0].device().is_cpu()) {
    if (options.reduceOp.op_ != c10d::ReduceOp::SUM) {
      throw Refused(here + " was given a sparse tensor and an operation other than SUM.",
                    "Sparse tensors are summed only.", "Call .to_dense() first.");
    }
    return enqueue(kCall, tensors, tensors, options.timeout, options.asyncOp, all_reduce_sparse(tensors[0]));
  }
  const auto& tensor = the_one(tensors, here);
  return enqueue(kCall, tensors, tensors, options.timeout, options.asyncOp,
                 all_reduce_each({tensor}, {reduction_for(tensor, options.reduceOp, here)}));
}

WorkPtr ProcessGroupMlsys::allreduce_sparse(std::vector<at::Tensor>& tensors,
                                            const c10d::AllreduceOptions& options) {
  constexpr Call kCall{OpType::_ALLREDUCE_SPARSE, "all_reduce", "mlsys:all_reduce"};
  if (auto* backend = elsewhere(kCall, tensors)) return backend->allreduce_sparse(tensors, options);
  return allreduce(tensors, options);
}

WorkPtr ProcessGroupMlsys::allreduce_coalesced(std::vector<at::Tensor>& tensors,
                                               const c10d::AllreduceCoalescedOptions& options) {
  constexpr Call kCall{OpType::ALLREDUCE_COALESCED, "all_reduce_coalesced", "mlsys:all_reduce"};
  if (auto* backend = elsewhere(kCall, tensors)) return backend->allreduce_coalesced(tensors, options);
  const auto here = where(kCall.name);
  check_tensors(tensors, here);
  return enqueue(kCall, tensors, tensors, options.timeout, options.asyncOp,
                 all_reduce_each(tensors, reductions_for(tensors, options.reduceOp, here)));
}

WorkPtr ProcessGroupMlsys::reduce(std::vector<at::Tensor>& tensors, const c10d::ReduceOptions& options) {
  constexpr Call kCall{OpType::REDUCE, "reduce", "mlsys:reduce"};
  if (auto* backend = elsewhere(kCall, tensors)) return backend->reduce(tensors, options);
  const auto here = where(kCall.name);
  const auto& tensor = the_one(tensors, here);
  const auto reduction = reduction_for(tensor, options.reduceOp, here);
  return enqueue(kCall, tensors, tensors, options.timeout, options.asyncOp,
                 reduce_to_root(tensor, reduction, checked_root(options.rootRank, here)));
}

WorkPtr ProcessGroupMlsys::reduce_scatter(std::vector<at::Tensor>& outputs, TensorLists& inputs,
                                          const c10d::ReduceScatterOptions& options) {
  constexpr Call kCall{OpType::REDUCE_SCATTER, "reduce_scatter", "mlsys:reduce_scatter"};
  if (auto* backend = elsewhere(kCall, outputs, inputs))
    return backend->reduce_scatter(outputs, inputs, options);
  const auto here = where(kCall.name);
  const auto& output = the_one(outputs, here);
  if (inputs.size() != 1) {
    throw Refused(here + " was given " + std::to_string(inputs.size()) + " input lists.", "One is expected.",
                  "Call it once for each output.");
  }
  check_alike(output, inputs[0], getSize(), here);
  const auto reduction = reduction_for(output, options.reduceOp, here);
  return enqueue(kCall, inputs[0], outputs, options.timeout, options.asyncOp,
                 reduce_scatter_lists(inputs, outputs, reduction));
}

WorkPtr ProcessGroupMlsys::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                const c10d::ReduceScatterOptions& options) {
  constexpr Call kCall{OpType::_REDUCE_SCATTER_BASE, "reduce_scatter_tensor", "mlsys:_reduce_scatter_base"};
  if (auto* backend = elsewhere(kCall, output, input)) {
    return backend->_reduce_scatter_base(output, input, options);
  }
  const auto here = where(kCall.name);
  check_parts(output, input, getSize(), here);
  return enqueue(kCall, {input}, {output}, options.timeout, options.asyncOp,
                 reduce_scatter_flat({input}, {output}, {reduction_for(output, options.reduceOp, here)}));
}

WorkPtr ProcessGroupMlsys::reduce_scatter_tensor_coalesced(std::vector<at::Tensor>& outputs,
                                                           std::vector<at::Tensor>& inputs,
                                                           const c10d::ReduceScatterOptions& options) {
  constexpr Call kCall{OpType::REDUCE_SCATTER_TENSOR_COALESCED, "reduce_scatter_tensor_coalesced",
                       "mlsys:reduce_scatter_tensor_coalesced"};
  if (auto* backend = elsewhere(kCall, outputs, inputs)) {
    return backend->reduce_scatter_tensor_coalesced(outputs, inputs, options);
  }
  const auto here = where(kCall.name);
  if (outputs.size() != inputs.size()) {
    throw Refused(here + " was given " + std::to_string(inputs.size()) + " inputs and " +
                      std::to_string(outputs.size()) + " outputs.",
                  "As many outputs as inputs are needed.", "Pair them up.");
  }
  for (size_t i = 0; i < outputs.size(); ++i) check_parts(outputs[i], inputs[i], getSize(), here);
  return enqueue(kCall, inputs, outputs, options.timeout, options.asyncOp,
                 reduce_scatter_flat(inputs, outputs, reductions_for(outputs, options.reduceOp, here)));
}

}  // namespace mlsys::binding
