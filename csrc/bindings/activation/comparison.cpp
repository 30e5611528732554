#include "bindings/activation/comparison.h"

#include <algorithm>
#include <sstream>
#include <utility>

#include "bindings/activation/thread_state.h"

namespace py = pybind11;

namespace mlsys::activation {

namespace {

thread_local const std::string* saving_inputs_of = nullptr;

}  // namespace

Signature Signature::of(const at::Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {{sizes.begin(), sizes.end()}, tensor.scalar_type(), tensor.device()};
}

std::string Signature::text() const {
  py::tuple shape(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) shape[i] = sizes[i];
  std::ostringstream text;
  text << name_of(dtype) << py::str(shape).cast<std::string>() << " on " << device;
  return text.str();
}

SavingInputs::SavingInputs(const std::string& block) : outer_(std::exchange(saving_inputs_of, &block)) {}
SavingInputs::~SavingInputs() { saving_inputs_of = outer_; }

Comparison::Comparison(py::object checksum)
    : checksum_(std::move(checksum)), first_number_(next_node_number()) {}

void Comparison::add(const at::Tensor& tensor) {
  Saved& saved = saved_.emplace_back();
  saved.checksum = checksum_of(tensor);
  saved.giver = giver_of(tensor);
  saved.saver_number = next_node_number() - 1;
  if (saving_inputs_of != nullptr) saved.saver = "the block '" + *saving_inputs_of + "'";
}

void Comparison::name_savers(const std::vector<at::Tensor>& results) {
  const auto names = operations_since(results, first_number_);
  for (Saved& saved : saved_) {
    const auto found = names.find(saved.saver_number);
    if (saved.saver.empty() && found != names.end()) saved.saver = found->second;
  }
}

void Comparison::add_input(const at::Tensor* tensor) {
  inputs_.push_back(tensor == nullptr ? py::none() : checksum_of(*tensor));
}

bool Comparison::equals(size_t index, const at::Tensor& tensor) {
  num_compared_ = std::max(num_compared_, index + 1);
  return same(saved_[index].checksum, tensor);
}

bool Comparison::equals_input(size_t index, const at::Tensor& tensor) const {
  return same(inputs_[index], tensor);
}

bool Comparison::same(const py::object& checksum, const at::Tensor& tensor) const {
  if (checksum.is_none()) return true;
  const py::object now = checksum_of(tensor);
  return now.is_none() || tensor_of(now.ptr()).equal(tensor_of(checksum.ptr()));
}

py::object Comparison::checksum_of(const at::Tensor& tensor) const {
  const CompilerSet no_compiler{py::none()};
  return checksum_(py::reinterpret_steal<py::object>(object_of(tensor)));
}

std::string Comparison::origin(size_t index) const {
  const Saved& saved = saved_[index];
  std::string text = given_by(saved.giver);
  if (!saved.saver.empty()) text += (text.empty() ? "saved by " : ", saved by ") + saved.saver;
  return text;
}

std::string given_by(const std::string& operation) {
  return operation.empty() ? "" : "given by " + operation;
}

}  // namespace mlsys::activation
