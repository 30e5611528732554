#include "bindings/activation/autograd.h"

#include <ATen/SequenceNumber.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cctype>
#include <string_view>
#include <unordered_set>

namespace mlsys::activation {

bool is_tensor(PyObject* object) { return THPVariable_Check(object); }
const at::Tensor& tensor_of(PyObject* object) { return THPVariable_Unpack(object); }
PyObject* object_of(const at::Tensor& tensor) { return THPVariable_Wrap(tensor); }
std::string name_of(at::ScalarType dtype) {
  return std::string("torch.") + reinterpret_cast<THPDtype*>(torch::getTHPDtype(dtype))->name;
}

int64_t current_graph_task() { return torch::autograd::get_current_graph_task_id(); }

uint32_t version_of(const at::Tensor& tensor) { return tensor.is_inference() ? 0 : tensor._version(); }

namespace {

using torch::autograd::Node;

// "torch::autograd::generated::DivBackward0" -> "div"; a custom function keeps its name: "Swish".
std::string operation_of(const Node& node) {
  std::string name = node.name();
  if (const size_t scope = name.rfind("::"); scope != std::string::npos) name.erase(0, scope + 2);
  const size_t without_digits = name.find_last_not_of("0123456789") + 1;
  constexpr std::string_view kSuffix = "Backward";
  if (without_digits < kSuffix.size() ||
      name.compare(without_digits - kSuffix.size(), kSuffix.size(), kSuffix) != 0)
    return name;
  const bool is_torchs = without_digits < name.size();
  name.resize(without_digits - kSuffix.size());
  if (!is_torchs) return name;
  std::string words;
  for (size_t i = 0; i < name.size(); ++i) {
    const auto letter = static_cast<unsigned char>(name[i]);
    if (i > 0 && std::isupper(letter)) words += '_';
    words += static_cast<char>(std::tolower(letter));
  }
  return words;
}

bool is_view(const std::string& operation) {
  static const std::unordered_set<std::string> kViews = {
      "view",    "_unsafe_view", "unsafe_view", "reshape_alias", "as_strided", "t",      "transpose",
      "permute", "expand",       "squeeze",     "unsqueeze",     "slice",      "select", "alias"};
  return kViews.contains(operation);
}

}  // namespace

std::string giver_of(const at::Tensor& tensor) {
  const Node* node = tensor.grad_fn().get();
  if (node == nullptr) return "";
  std::string operation = operation_of(*node);
  while (is_view(operation) && node->num_outputs() == 1 && node->next_edge(0).is_valid()) {
    const Node* before = node->next_edge(0).function.get();
    if (before->num_inputs() == 0 || before->name().find("AccumulateGrad") != std::string::npos) break;
    node = before;
    operation = operation_of(*node);
  }
  return operation;
}

uint64_t next_node_number() { return at::sequence_number::peek(); }

std::unordered_map<uint64_t, std::string> operations_since(const std::vector<at::Tensor>& results,
                                                           uint64_t first_number) {
  std::unordered_map<uint64_t, std::string> found;
  std::vector<const Node*> waiting;
  for (const at::Tensor& result : results) waiting.push_back(result.grad_fn().get());
  while (!waiting.empty()) {
    const Node* node = waiting.back();
    waiting.pop_back();
    // AccumulateGrad has the highest number of all.
    if (node == nullptr || node->sequence_nr() < first_number || node->sequence_nr() == UINT64_MAX) continue;
    if (!found.emplace(node->sequence_nr(), operation_of(*node)).second) continue;
    for (const auto& edge : node->next_edges()) waiting.push_back(edge.function.get());
  }
  return found;
}

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
