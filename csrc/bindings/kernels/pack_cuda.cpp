// torch.ops.mlsys.pack and unpack, CUDA. Compiled when torch has CUDA and nvcc exists (USE_CUDA).
#ifdef USE_CUDA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "activation/pack/launch.h"
#include "bindings/kernels/cuda_stream.h"
#include "bindings/kernels/pack_checks.h"

namespace mlsys::bindings {
namespace {

void pack_cuda(const Tensor& input, const Tensor& packed, int64_t form, int64_t seed) {
  const PackCall call = check_pack("pack", input, packed, form, /*on_cpu=*/false);
  packing::cuda::pack({call.form, call.dtype, input.const_data_ptr(), packed.mutable_data_ptr(),
                       input.numel(), seed, current_stream(input)});
}

void unpack_cuda(const Tensor& packed, const Tensor& out, int64_t form) {
  const PackCall call = check_pack("unpack", out, packed, form, /*on_cpu=*/false);
  packing::cuda::unpack({call.form, call.dtype, packed.const_data_ptr(), out.mutable_data_ptr(), out.numel(),
                         0, current_stream(out)});
}

}  // namespace
}  // namespace mlsys::bindings

STABLE_TORCH_LIBRARY_IMPL(mlsys, CUDA, m) {
  m.impl("pack", TORCH_BOX(&mlsys::bindings::pack_cuda));
  m.impl("unpack", TORCH_BOX(&mlsys::bindings::unpack_cuda));
}
#endif  // USE_CUDA
