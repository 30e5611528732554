#include <utility>

#include "bindings/comm/bodies.h"
#include "bindings/comm/tensors.h"

namespace mlsys::binding {
namespace {

using comm::Communicator;
using std::chrono::milliseconds;

size_t bytes_of(const at::Tensor& tensor) { return tensor.numel() * tensor.element_size(); }

std::vector<size_t> bytes_of(const Tensors& tensors) {
  std::vector<size_t> bytes;
  for (const auto& tensor : tensors) bytes.push_back(bytes_of(tensor));
  return bytes;
}

size_t bytes_of_row(const at::Tensor& tensor) {
  return tensor.size(0) == 0 ? tensor.element_size() : bytes_of(tensor) / tensor.size(0);
}

// Start and length in bytes of each rank's part of a buffer that is split along dim 0.
struct Parts {
  std::vector<char*> starts;
  std::vector<size_t> bytes;
};

Parts parts_of(const at::Tensor& tensor, const void* data, const std::vector<int64_t>& splits) {
  const size_t row = bytes_of_row(tensor);
  Parts parts;
  auto* next = const_cast<char*>(static_cast<const char*>(data));
  for (const int64_t rows : splits) {
    parts.starts.push_back(next);
    parts.bytes.push_back(rows * row);
    next += rows * row;
  }
  return parts;
}

}  // namespace

Body broadcast_from(at::Tensor tensor, int root) {
  return [tensor = std::move(tensor), root](Communicator& group, milliseconds timeout) {
    const auto dense = group.rank() == root ? dense_input(tensor) : dense_output(tensor);
    group.broadcast(dense.mutable_data_ptr(), bytes_of(dense), root, timeout);
    if (group.rank() != root) write_back(dense, tensor);
  };
}

Body all_gather_lists(Tensors inputs, std::vector<Tensors> outputs) {
  return
      [inputs = std::move(inputs), outputs = std::move(outputs)](Communicator& group, milliseconds timeout) {
        for (size_t i = 0; i < inputs.size(); ++i) {
          const auto input = dense_input(inputs[i]);
          const auto parts = dense_outputs(outputs[i]);
          group.all_gather(input.const_data_ptr(), output_pointers(parts), bytes_of(input), timeout);
          write_back(parts, outputs[i]);
        }
      };
}

Body all_gather_flat(Tensors inputs, Tensors outputs) {
  return
      [inputs = std::move(inputs), outputs = std::move(outputs)](Communicator& group, milliseconds timeout) {
        for (size_t i = 0; i < inputs.size(); ++i) {
          const auto input = dense_input(inputs[i]);
          const auto output = dense_output(outputs[i]);
          auto* first = static_cast<char*>(output.mutable_data_ptr());
          std::vector<void*> parts(group.size());
          for (size_t rank = 0; rank < parts.size(); ++rank) parts[rank] = first + rank * bytes_of(input);
          group.all_gather(input.const_data_ptr(), parts, bytes_of(input), timeout);
          write_back(output, outputs[i]);
        }
      };
}

Body gather_to(at::Tensor input, Tensors outputs, int root) {
  return [input = std::move(input), outputs = std::move(outputs), root](Communicator& group,
                                                                        milliseconds timeout) {
    const auto dense = dense_input(input);
    const auto parts = dense_outputs(outputs);
    group.gather(dense.const_data_ptr(), output_pointers(parts), bytes_of(dense), root, timeout);
    write_back(parts, outputs);
  };
}

Body scatter_from(Tensors inputs, at::Tensor output, int root) {
  return [inputs = std::move(inputs), output = std::move(output), root](Communicator& group,
                                                                        milliseconds timeout) {
    const auto parts = dense_inputs(inputs);
    const auto dense = dense_output(output);
    group.scatter(input_pointers(parts), dense.mutable_data_ptr(), bytes_of(dense), root, timeout);
    write_back(dense, output);
  };
}

Body all_to_all_lists(Tensors inputs, Tensors outputs) {
  return
      [inputs = std::move(inputs), outputs = std::move(outputs)](Communicator& group, milliseconds timeout) {
        const auto sent = dense_inputs(inputs);
        const auto received = dense_outputs(outputs);
        group.all_to_all(input_pointers(sent), bytes_of(sent), output_pointers(received), bytes_of(received),
                         timeout);
        write_back(received, outputs);
      };
}

Body all_to_all_flat(at::Tensor input, std::vector<int64_t> input_splits, at::Tensor output,
                     std::vector<int64_t> output_splits) {
  return [input = std::move(input), input_splits = std::move(input_splits), output = std::move(output),
          output_splits = std::move(output_splits)](Communicator& group, milliseconds timeout) {
    const auto sent = dense_input(input);
    const auto received = dense_output(output);
    const auto from = parts_of(sent, sent.const_data_ptr(), input_splits);
    const auto to = parts_of(received, received.mutable_data_ptr(), output_splits);
    const std::vector<const void*> inputs(from.starts.begin(), from.starts.end());
    const std::vector<void*> outputs(to.starts.begin(), to.starts.end());
    group.all_to_all(inputs, from.bytes, outputs, to.bytes, timeout);
    write_back(received, output);
  };
}

}  // namespace mlsys::binding
