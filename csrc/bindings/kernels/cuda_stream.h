// The stream on which torch runs what is called now, for the sources with USE_CUDA.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

// Weak, so that a library built with CUDA still loads under a torch without it; the kernels are then never
// called.
#pragma weak aoti_torch_get_current_cuda_stream

namespace mlsys::bindings {

inline void* current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

}  // namespace mlsys::bindings
