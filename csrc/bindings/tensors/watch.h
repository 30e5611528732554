// Tells in one look whether a step may use what the step before it has built.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace mlsys::binding {

namespace py = pybind11;

// What a step was built from: parameters and the shapes of their gradients, the places of everything that it
// reads or writes beside gradients, and the optimizer's state.
struct Subjects {
  py::list params;     // every parameter of the optimizer
  py::list gradients;  // what each was stepped with, or None
  py::list watched;    // other tensors that must stay where they are
  py::dict state;      // the optimizer's: a dictionary for each parameter, whose entries must stay the same
};

class Watch {
 public:
  // Null where the subjects are more than plain memory, which only Python can judge, or were not stepped with
  // their own gradients.
  static std::unique_ptr<Watch> make(const Subjects& subjects);

  // Whether `groups` hold the same parameters, laid out and with state as before, and gradients of the same
  // kind, wherever these lie. Then `addresses` are theirs, and their memory is kept until `release`.
  bool look(const py::list& groups);
  const at::Tensor& addresses() const { return addresses_; }
  void release();

 private:
  struct Kind {  // of a gradient
    uint64_t keys;
    caffe2::TypeMeta dtype;
    c10::DeviceIndex device;
    bool present;
    bool operator==(const Kind&) const = default;
  };
  static Kind kind_of(const c10::TensorImpl& tensor);

  explicit Watch(const Subjects& subjects);
  bool is_plain() const;
  bool same_parameters(const py::list& groups) const;
  bool same_state() const;
  bool same_places() const;
  bool same_layout(const c10::TensorImpl& tensor, size_t index) const;
  bool look_at_gradients();

  Subjects subjects_;  // keeps every object below alive
  std::vector<PyObject*> params_, watched_;
  std::vector<py::object> states_;
  std::vector<py::object> entries_;  // key, value of each state in turn
  std::vector<size_t> num_entries_;
  std::vector<int64_t> homes_, places_;  // addresses of the parameters, and of what is watched
  std::vector<Kind> kinds_;
  std::vector<int64_t> layouts_;       // sizes, then strides, of each parameter in turn
  std::vector<size_t> first_layouts_;  // where a parameter's begin
  at::Tensor addresses_;
  std::vector<c10::Storage> held_;
};

}  // namespace mlsys::binding
