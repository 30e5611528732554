// Collectives that c10d has no virtual for: the canonical tree, and compression between hosts. Python calls
// them on the native object (mlsys_engine/comm/tree.py, compressed.py).
#include "bindings/comm/failures.h"
#include "bindings/comm/process_group.h"
#include "bindings/comm/reduction.h"
#include "bindings/comm/tensors.h"

namespace mlsys::binding {

using c10d::OpType;
using comm::Communicator;
using std::chrono::milliseconds;
using WorkPtr = ProcessGroupMlsys::WorkPtr;

namespace {

Body all_reduce_tree_of(at::Tensor tensor, comm::Reduction reduction) {
  return [tensor = std::move(tensor), reduction](Communicator& group, milliseconds timeout) {
    const auto dense = dense_input(tensor);
    group.all_reduce_tree(dense.mutable_data_ptr(), num_reduced(dense), reduction, timeout);
    write_back(dense, tensor);
  };
}

Body reduce_scatter_tree_of(at::Tensor input, at::Tensor output, comm::Reduction reduction) {
  return [input = std::move(input), output = std::move(output), reduction](Communicator& group,
                                                                           milliseconds timeout) {
    const auto whole = dense_input(input);
    const auto part = dense_output(output);
    const auto* first = static_cast<const char*>(whole.const_data_ptr());
    std::vector<const void*> parts(group.size());
    for (size_t rank = 0; rank < parts.size(); ++rank) parts[rank] = first + rank * part.nbytes();
    group.reduce_scatter_tree(parts, part.mutable_data_ptr(), num_reduced(part), reduction, timeout);
    write_back(part, output);
  };
}

Body all_reduce_compressed_of(at::Tensor tensor, std::optional<at::Tensor> residual,
                              comm::Compression compression, bool average) {
  return [tensor = std::move(tensor), residual = std::move(residual), compression, average](
             Communicator& group, milliseconds timeout) {
    const auto dense = dense_input(tensor);
    auto* kept = residual ? residual->mutable_data_ptr<float>() : nullptr;
    group.all_reduce_compressed(dense.mutable_data_ptr<float>(), dense.numel(), average, compression, kept,
                                timeout);
    write_back(dense, tensor);
  };
}

comm::Compression compression_named(const std::string& name, const Where& where) {
  if (name == "bf16") return comm::Compression::kBFloat16;
  if (name == "int8") return comm::Compression::kInt8;
  throw Refused(where + " was given compression \"" + name + "\".", "It is \"bf16\" or \"int8\".",
                "Use all_reduce for none.");
}

void check_residual(const at::Tensor& residual, const at::Tensor& tensor, const Where& where) {
  check_tensor(residual, where);
  if (residual.scalar_type() == at::kFloat && residual.is_contiguous() &&
      residual.numel() == tensor.numel()) {
    return;
  }
  throw Refused(where + " was given a residual of " + std::to_string(residual.numel()) + " elements of " +
                    c10::toString(residual.scalar_type()) + " for a tensor of " +
                    std::to_string(tensor.numel()) + ".",
                "It is contiguous float32 with as many elements as the tensor.",
                "Start with torch.zeros(tensor.numel()), and pass the same one each time.");
}

}  // namespace

WorkPtr ProcessGroupMlsys::all_reduce_tree(at::Tensor& tensor, const c10d::ReduceOp& op, bool async) {
  constexpr Call kCall{OpType::ALLREDUCE, "all_reduce_tree", "mlsys:all_reduce_tree"};
  const auto here = where(kCall.name);
  check_tensor(tensor, here);
  return enqueue(kCall, {tensor}, {tensor}, milliseconds(0), async,
                 all_reduce_tree_of(tensor, reduction_for(tensor, op, here)));
}

WorkPtr ProcessGroupMlsys::reduce_scatter_tree(at::Tensor& output, at::Tensor& input,
                                               const c10d::ReduceOp& op, bool async) {
  constexpr Call kCall{OpType::_REDUCE_SCATTER_BASE, "reduce_scatter_tree", "mlsys:reduce_scatter_tree"};
  const auto here = where(kCall.name);
  check_parts(output, input, getSize(), here);
  return enqueue(kCall, {input}, {output}, milliseconds(0), async,
                 reduce_scatter_tree_of(input, output, reduction_for(output, op, here)));
}

WorkPtr ProcessGroupMlsys::all_reduce_compressed(at::Tensor& tensor, const std::string& compression,
                                                 const std::optional<at::Tensor>& residual, bool average,
                                                 bool async) {
  constexpr Call kCall{OpType::ALLREDUCE, "all_reduce_compressed", "mlsys:all_reduce_compressed"};
  const auto here = where(kCall.name);
  check_tensor(tensor, here);
  if (tensor.scalar_type() != at::kFloat) {
    throw Refused(here + " was given a tensor of " + c10::toString(tensor.scalar_type()) + ".",
                  "Only float32 is compressed.", "Use all_reduce for other types.");
  }
  if (residual) check_residual(*residual, tensor, here);
  return enqueue(kCall, {tensor}, {tensor}, milliseconds(0), async,
                 all_reduce_compressed_of(tensor, residual, compression_named(compression, here), average));
}

}  // namespace mlsys::binding
