// What pack and unpack check about their tensors, on the CPU and on CUDA.
#pragma once

#include "activation/pack/forms.h"
#include "bindings/kernels/checks.h"

namespace mlsys::bindings {

struct PackCall {
  packing::Form form;
  DType dtype;
};

inline DType packable_type(const char* op, ScalarType type) {
  switch (type) {
    case ScalarType::Bool:
      return DType::kBool;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": the elements are ", torch::headeronly::toString(type),
                      ". bool, float32, bfloat16 or float16 is expected. Keep other tensors as they are.");
  }
}

// `elements` is what is or will be packed, `packed` the bytes.
inline PackCall check_pack(const char* op, const Tensor& elements, const Tensor& packed, int64_t form,
                           bool on_cpu) {
  STD_TORCH_CHECK(form >= 0 && form < packing::kNumForms, op, ": form is ", form, ". 0 to ",
                  packing::kNumForms - 1, " is expected. See mlsys_engine/activation/packing.py.");
  const PackCall call{static_cast<packing::Form>(form), packable_type(op, elements.scalar_type())};
  STD_TORCH_CHECK(packing::takes(call.form, call.dtype), op, ": form ", form, " was given ",
                  describe(elements),
                  ". mask takes bool, bf16 takes float32, the others take float32, "
                  "bfloat16 and float16. See mlsys_engine/activation/packing.py.");
  check_flat(elements, elements.scalar_type(), op, "the elements' tensor", on_cpu);
  check_flat(packed, ScalarType::Byte, op, "the packed tensor", on_cpu);
  const int64_t bytes = packing::packed_bytes(call.form, elements.numel());
  STD_TORCH_CHECK(packed.numel() == bytes, op, ": the packed tensor is ", describe(packed), ". ", bytes,
                  " bytes are expected for ", elements.numel(),
                  " elements. Ask mlsys_engine.activation.packing.packed_bytes.");
  const auto address = reinterpret_cast<uintptr_t>(packed.const_data_ptr());
  STD_TORCH_CHECK(address % packing::kAlignment == 0, op, ": the packed tensor begins ",
                  static_cast<int64_t>(address % packing::kAlignment), " bytes after a multiple of ",
                  packing::kAlignment, ". It is aligned to that. Allocate it, or cut it at such an offset.");
  return call;
}

}  // namespace mlsys::bindings
