// What the files of this folder add to the module _activation.
#pragma once

#include <pybind11/pybind11.h>

namespace mlsys::activation {

void bind_frame(pybind11::module_& module);         // frame.cpp
void bind_chain_solver(pybind11::module_& module);  // chain_solver.cpp

}  // namespace mlsys::activation
