// torch.ops.mlsys.pack and unpack, CPU: checks the tensors, then hands raw pointers to csrc/activation/pack.
//
// The caller gives the result's tensor, so that it may lie in a slab of its own (a pinned ring, a mapped
// file).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "activation/pack/launch.h"
#include "bindings/kernels/pack_checks.h"
#include "bindings/kernels/torch_pool.h"

namespace mlsys::bindings {
namespace {

void pack_cpu(const Tensor& input, const Tensor& packed, int64_t form, int64_t seed) {
  const PackCall call = check_pack("pack", input, packed, form, /*on_cpu=*/true);
  packing::pack({call.form, call.dtype, input.const_data_ptr(), packed.mutable_data_ptr(), input.numel(),
                 seed, torch_pool});
}

void unpack_cpu(const Tensor& packed, const Tensor& out, int64_t form) {
  const PackCall call = check_pack("unpack", out, packed, form, /*on_cpu=*/true);
  packing::unpack(
      {call.form, call.dtype, packed.const_data_ptr(), out.mutable_data_ptr(), out.numel(), 0, torch_pool});
}

}  // namespace
}  // namespace mlsys::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(mlsys, m) {
  m.def("pack(Tensor input, Tensor(a!) packed, int form, int seed=0) -> ()");
  m.def("unpack(Tensor packed, Tensor(a!) out, int form) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mlsys, CPU, m) {
  m.impl("pack", TORCH_BOX(&mlsys::bindings::pack_cpu));
  m.impl("unpack", TORCH_BOX(&mlsys::bindings::unpack_cpu));
}
