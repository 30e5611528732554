// The arguments of a call with its tensors taken out, so that the call can be made again with other tensors.
//
// Tuples, lists and dictionaries are walked here. What else may hold tensors (named tuples, dataclasses and
// other registered pytrees) is opened by a Python callable: open(value) -> None for a plain value, or (parts,
// close) with close(parts) -> value. The same callable may replace a value by giving no parts.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace mlsys::activation {

class Arguments {
 public:
  Arguments(const pybind11::tuple& positional, const pybind11::dict& keywords, const pybind11::object& open);

  const std::vector<at::Tensor>& tensors() const { return tensors_; }
  void release_tensors() { tensors_.clear(); }
  // True when rebuilding gives something else than what was given, apart from its tensors.
  bool opened() const { return opened_; }

  // The call's arguments with these tensors, in the order of tensors().
  pybind11::tuple positional(const std::vector<at::Tensor>& tensors) const;
  pybind11::dict keywords(const std::vector<at::Tensor>& tensors) const;

 private:
  enum class Kind : uint8_t { kTensor, kPlain, kTuple, kList, kDict, kOpened };
  struct Node {
    Kind kind;
    size_t tensor = 0;           // kTensor: its index
    pybind11::object value;      // kPlain: the value; kDict: its keys, a tuple; kOpened: close
    std::vector<Node> children;  // in order
  };

  Node take(const pybind11::handle& value, const pybind11::object& open);
  void take_dict(const pybind11::dict& values, const pybind11::object& open, Node& node);
  static pybind11::object put(const Node& node, const std::vector<at::Tensor>& tensors);

  std::vector<at::Tensor> tensors_;  // before the nodes, whose construction fills it
  bool opened_ = false;
  Node positional_, keywords_;
};

}  // namespace mlsys::activation
