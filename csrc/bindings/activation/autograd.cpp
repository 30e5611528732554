#include "bindings/activation/autograd.h"

#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

namespace mlsys::activation {

bool is_tensor(PyObject* object) { return THPVariable_Check(object); }
const at::Tensor& tensor_of(PyObject* object) { return THPVariable_Unpack(object); }
PyObject* object_of(const at::Tensor& tensor) { return THPVariable_Wrap(tensor); }
std::string name_of(at::ScalarType dtype) {
  return std::string("torch.") + reinterpret_cast<THPDtype*>(torch::getTHPDtype(dtype))->name;
}

int64_t current_graph_task() { return torch::autograd::get_current_graph_task_id(); }

struct SavedTensors::Kept {
  std::vector<torch::autograd::SavedVariable> tensors;
};

SavedTensors::SavedTensors() : kept_(std::make_unique<Kept>()) {}
SavedTensors::~SavedTensors() = default;
SavedTensors::SavedTensors(SavedTensors&&) noexcept = default;

void SavedTensors::add(const at::Tensor& tensor) { kept_->tensors.emplace_back(tensor, /*is_output=*/false); }
void SavedTensors::add_nothing() { kept_->tensors.emplace_back(); }
at::Tensor SavedTensors::read(size_t index) const { return kept_->tensors[index].unpack(); }
size_t SavedTensors::size() const { return kept_->tensors.size(); }

}  // namespace mlsys::activation
