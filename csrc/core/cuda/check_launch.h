// Whether the kernel before this line could be launched.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mlsys::cuda {

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(
        std::string("The launch of ") + kernel + " failed: " + cudaGetErrorString(error) +
        ". The kernels are compiled for the architectures in TORCH_CUDA_ARCH_LIST; rebuild for "
        "this GPU, or look at the first CUDA error above.");
  }
}

}  // namespace mlsys::cuda
