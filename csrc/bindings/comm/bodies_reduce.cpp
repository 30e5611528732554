#include <utility>

#include "bindings/comm/bodies.h"
#include "bindings/comm/reduction.h"
#include "bindings/comm/tensors.h"

namespace mlsys::binding {

using comm::Communicator;
using comm::Reduction;
using std::chrono::milliseconds;

Body all_reduce_each(Tensors tensors, std::vector<Reduction> reductions) {
  return [tensors = std::move(tensors), reductions = std::move(reductions)](Communicator& group,
                                                                            milliseconds timeout) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const auto dense = dense_input(tensors[i]);
      group.all_reduce(dense.mutable_data_ptr(), num_reduced(dense), reductions[i], timeout);
      write_back(dense, tensors[i]);
    }
  };
}

Body reduce_to_root(at::Tensor tensor, Reduction reduction, int root) {
  return [tensor = std::move(tensor), reduction, root](Communicator& group, milliseconds timeout) {
    const auto dense = dense_input(tensor);
    group.reduce(dense.mutable_data_ptr(), num_reduced(dense), reduction, root, timeout);
    if (group.rank() == root) write_back(dense, tensor);
  };
}

Body reduce_scatter_lists(std::vector<Tensors> inputs, Tensors outputs, Reduction reduction) {
  return [inputs = std::move(inputs), outputs = std::move(outputs), reduction](Communicator& group,
                                                                               milliseconds timeout) {
    for (size_t i = 0; i < outputs.size(); ++i) {
      const auto parts = dense_inputs(inputs[i]);
      const auto output = dense_output(outputs[i]);
      group.reduce_scatter(input_pointers(parts), output.mutable_data_ptr(), num_reduced(output), reduction,
                           timeout);
      write_back(output, outputs[i]);
    }
  };
}

Body reduce_scatter_flat(Tensors inputs, Tensors outputs, std::vector<Reduction> reductions) {
  return [inputs = std::move(inputs), outputs = std::move(outputs), reductions = std::move(reductions)](
             Communicator& group, milliseconds timeout) {
    for (size_t i = 0; i < outputs.size(); ++i) {
      const auto input = dense_input(inputs[i]);
      const auto output = dense_output(outputs[i]);
      const auto* first = static_cast<const char*>(input.const_data_ptr());
      const size_t bytes = output.numel() * output.element_size();
      std::vector<const void*> parts(group.size());
      for (size_t rank = 0; rank < parts.size(); ++rank) parts[rank] = first + rank * bytes;
      group.reduce_scatter(parts, output.mutable_data_ptr(), num_reduced(output), reductions[i], timeout);
      write_back(output, outputs[i]);
    }
  };
}

}  // namespace mlsys::binding
