// What the run time needs of torch's autograd and of Python's tensors, behind a header that compiles quickly.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace mlsys::activation {

bool is_tensor(PyObject* object);
// The tensor of an object for which is_tensor() holds.
const at::Tensor& tensor_of(PyObject* object);
// A new reference.
PyObject* object_of(const at::Tensor& tensor);
// As Python prints it: "torch.float32".
std::string name_of(at::ScalarType dtype);

// The backward pass under way in this thread, -1 outside of one.
int64_t current_graph_task();

// How often the tensor was changed in place; 0 for those that do not count.
uint32_t version_of(const at::Tensor& tensor);

// The operation that gave the tensor, by its autograd node, looking through views: "div"; empty without a
// node.
std::string giver_of(const at::Tensor& tensor);
// The sequence number that this thread's next autograd node will get.
uint64_t next_node_number();
// The operations behind these tensors whose nodes have this number or a higher one, by number.
std::unordered_map<uint64_t, std::string> operations_since(const std::vector<at::Tensor>& results,
                                                           uint64_t first_number);

// Tensors kept as autograd keeps what a node saves: saved-tensor hooks see them, and reading one that was
// changed in place raises.
class SavedTensors {
 public:
  SavedTensors();
  ~SavedTensors();
  SavedTensors(SavedTensors&&) noexcept;
  void add(const at::Tensor& tensor);
  void add_nothing();  // keeps the numbering
  at::Tensor read(size_t index) const;
  size_t size() const;

 private:
  struct Kept;
  std::unique_ptr<Kept> kept_;
};

}  // namespace mlsys::activation
