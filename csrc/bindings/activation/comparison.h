// The first step's check that a second run saves what the first run would have saved.
//
// Signatures (shape, type, device) are compared in every step. Values are compared in the first step of each
// part, by checksums: the first run's tensors are gone by then. What is found is told with the operation
// behind the tensor: the one that gave it, by its autograd node, and the one that saves it. The latter's node
// is not there yet when it saves an input, but its sequence number is: nodes are numbered when they are made,
// and an operation saves its inputs right after that. Test: tests/activation/test_soundness.py.
#pragma once

#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/activation/autograd.h"

namespace mlsys::activation {

// What a saved tensor looked like; the second run must reproduce it.
struct Signature {
  c10::SmallVector<int64_t, 5> sizes;
  at::ScalarType dtype;
  at::Device device;

  static Signature of(const at::Tensor& tensor);
  bool operator==(const Signature&) const = default;
  std::string text() const;
};

// While it lives, what this thread saves are the inputs of a block, and no operation's.
class SavingInputs {
 public:
  explicit SavingInputs(const std::string& block);
  ~SavingInputs();
  SavingInputs(const SavingInputs&) = delete;
  SavingInputs& operator=(const SavingInputs&) = delete;

 private:
  const std::string* outer_;
};

class Comparison {
 public:
  // `checksum(tensor)` gives a tensor, equal for equal bits, or None where values cannot be compared.
  explicit Comparison(pybind11::object checksum);

  // First run: a tensor is being saved. Called in order.
  void add(const at::Tensor& tensor);
  // After the first run: gives the operations that saved the tensors their names.
  void name_savers(const std::vector<at::Tensor>& results);
  // First run: an input that is kept by nobody, or nothing for one that is.
  void add_input(const at::Tensor* tensor);

  bool equals(size_t index, const at::Tensor& tensor);
  bool equals_input(size_t index, const at::Tensor& tensor) const;
  // True once every tensor was compared.
  bool is_done() const { return num_compared_ >= saved_.size(); }
  // "given by add, saved by mul", with what is known.
  std::string origin(size_t index) const;

 private:
  struct Saved {
    pybind11::object checksum;
    std::string giver, saver;
    uint64_t saver_number;  // sequence number of its node
  };
  pybind11::object checksum_of(const at::Tensor& tensor) const;
  bool same(const pybind11::object& checksum, const at::Tensor& tensor) const;

  pybind11::object checksum_;
  std::vector<Saved> saved_;
  std::vector<pybind11::object> inputs_;
  uint64_t first_number_;
  size_t num_compared_ = 0;
};

// "given by add", or nothing for a tensor that no operation with a gradient gave.
std::string given_by(const std::string& operation);

}  // namespace mlsys::activation
