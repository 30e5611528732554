// The module _activation.
#include "bindings/activation/bind.h"

PYBIND11_MODULE(_activation, module) {
  mlsys::activation::bind_frame(module);
  mlsys::activation::bind_chain_solver(module);
}
