#include "bindings/activation/arguments.h"

#include "bindings/activation/autograd.h"

namespace py = pybind11;

namespace mlsys::activation {

namespace {

bool is_surely_plain(PyObject* value) {
  return value == Py_None || PyBool_Check(value) || PyLong_CheckExact(value) || PyFloat_CheckExact(value) ||
         PyUnicode_CheckExact(value);
}

}  // namespace

Arguments::Arguments(const py::tuple& positional, const py::dict& keywords, const py::object& open)
    : positional_(take(positional, open)), keywords_(take(keywords, open)) {}

Arguments::Node Arguments::take(const py::handle& value, const py::object& open) {
  PyObject* object = value.ptr();
  if (is_tensor(object)) {
    tensors_.push_back(tensor_of(object));
    return {Kind::kTensor, tensors_.size() - 1, {}, {}};
  }
  if (is_surely_plain(object)) return {Kind::kPlain, 0, py::reinterpret_borrow<py::object>(value), {}};
  if (PyTuple_CheckExact(object) || PyList_CheckExact(object)) {
    Node node{PyTuple_CheckExact(object) ? Kind::kTuple : Kind::kList, 0, {}, {}};
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(object);
    node.children.reserve(size);
    for (Py_ssize_t i = 0; i < size; ++i)
      node.children.push_back(take(PySequence_Fast_GET_ITEM(object, i), open));
    return node;
  }
  if (PyDict_CheckExact(object)) {
    Node node{Kind::kDict, 0, {}, {}};
    take_dict(py::reinterpret_borrow<py::dict>(value), open, node);
    return node;
  }
  const py::object opened = open(value);
  if (opened.is_none()) return {Kind::kPlain, 0, py::reinterpret_borrow<py::object>(value), {}};
  opened_ = true;
  const py::tuple parts_and_close = opened;
  Node node{Kind::kOpened, 0, parts_and_close[1], {}};
  for (const py::handle& part : py::list(parts_and_close[0])) node.children.push_back(take(part, open));
  return node;
}

void Arguments::take_dict(const py::dict& values, const py::object& open, Node& node) {
  py::tuple keys(values.size());
  size_t position = 0;
  for (const auto& [key, value] : values) {
    keys[position++] = key;
    node.children.push_back(take(value, open));
  }
  node.value = std::move(keys);
}

py::object Arguments::put(const Node& node, const std::vector<at::Tensor>& tensors) {
  switch (node.kind) {
    case Kind::kTensor:
      return py::reinterpret_steal<py::object>(object_of(tensors[node.tensor]));
    case Kind::kPlain:
      return node.value;
    case Kind::kTuple: {
      py::tuple values(node.children.size());
      for (size_t i = 0; i < node.children.size(); ++i) values[i] = put(node.children[i], tensors);
      return values;
    }
    case Kind::kDict: {
      py::dict values;
      const py::tuple keys = node.value;
      for (size_t i = 0; i < node.children.size(); ++i) values[keys[i]] = put(node.children[i], tensors);
      return values;
    }
    case Kind::kList:
    case Kind::kOpened:
      break;
  }
  py::list values(node.children.size());
  for (size_t i = 0; i < node.children.size(); ++i) values[i] = put(node.children[i], tensors);
  return node.kind == Kind::kOpened ? node.value(values) : py::object(values);
}

py::tuple Arguments::positional(const std::vector<at::Tensor>& tensors) const {
  return put(positional_, tensors);
}

py::dict Arguments::keywords(const std::vector<at::Tensor>& tensors) const { return put(keywords_, tensors); }

}  // namespace mlsys::activation
