// torch.ops.mlsys.* for csrc/core: type conversion and what this process runs with.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "bindings/kernels/checks.h"
#include "core/convert.h"
#include "core/cpu.h"

namespace mlsys::bindings {
namespace {

DType core_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(
          false, "cast: ", torch::headeronly::toString(type),
          " was given. float32, bfloat16 and float16 are expected. Use Tensor.to for other types.");
  }
}

Tensor cast(const Tensor& input, ScalarType dtype) {
  check_flat(input, input.scalar_type(), "cast", "input");
  Tensor output = torch::stable::empty(input.sizes(), dtype);
  convert(input.const_data_ptr(), core_type(input.scalar_type()), output.mutable_data_ptr(), core_type(dtype),
          input.numel());
  return output;
}

std::string simd_level_name() { return name_of(simd_level()); }

}  // namespace
}  // namespace mlsys::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(mlsys, m) {
  m.def("cast(Tensor input, ScalarType dtype) -> Tensor");
  m.def("simd_level() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mlsys, CPU, m) { m.impl("cast", TORCH_BOX(&mlsys::bindings::cast)); }

STABLE_TORCH_LIBRARY_IMPL(mlsys, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&mlsys::bindings::simd_level_name));
}
