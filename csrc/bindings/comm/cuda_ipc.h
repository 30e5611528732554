// Registers CudaIpcAllReduce with the Python module, in builds with CUDA.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace mlsys::binding {

void define_cuda_ipc(pybind11::module_& m);

}  // namespace mlsys::binding
