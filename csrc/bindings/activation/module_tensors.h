// The parameters and buffers that a part of a model has while it runs: the second run must have the same.
//
// torch.func.functional_call puts other tensors into a module for the time of one call; by the backward they
// are gone. So the first run's tensors are remembered and put in again where others are found. A parameter
// that was changed in place between the runs is refused, as autograd refuses a saved tensor that was.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bindings/activation/autograd.h"

namespace mlsys::activation {

// Where a module keeps a tensor: `owner[leaf]`, `owner` being its dictionary of parameters or buffers.
struct ModuleTensorPlace {
  pybind11::dict owner;
  pybind11::str leaf;
  std::string name;
  bool is_parameter;
};
using ModuleTensorPlaces = std::vector<ModuleTensorPlace>;

class ModuleTensors {
 public:
  // Before the first run. The places outlive it.
  explicit ModuleTensors(const ModuleTensorPlaces& places);
  // After the first run, which may write to its parameters.
  void remember_versions();
  // The name of a parameter that was changed in place since; empty when there is none.
  std::string changed() const;

  // While it lives, the first run's tensors are in their places; then those that were there before.
  class Restored {
   public:
    explicit Restored(const ModuleTensors& first);
    ~Restored();
    Restored(const Restored&) = delete;
    Restored& operator=(const Restored&) = delete;

   private:
    const ModuleTensors& first_;
    std::vector<pybind11::object> present_;  // empty when all places have the first run's tensors
  };

 private:
  const ModuleTensorPlaces& places_;
  std::vector<pybind11::object> tensors_;
  std::vector<uint32_t> versions_;
};

}  // namespace mlsys::activation
