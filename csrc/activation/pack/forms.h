// The forms in which an activation waits for its backward, and their layouts. Each is one flat array of
// bytes.
//
// form      of                          element                          layout
// mask      bool                        1 bit                            element i is bit i % 8 of byte i / 8
// positive  float32, bfloat16, float16  1 bit: !(x <= 0)                 the same
// bfloat16  float32                     the nearest bfloat16             2 bytes each
// int8      float32, bfloat16, float16  a multiple of its block's step   64 bytes for each block of 64, then
// fp8       float32, bfloat16, float16  e4m3 of its block's step         the float32 steps of the blocks
//
// The elements are contiguous and aligned to their own size; a packed array is aligned to 16 bytes. Bits past
// the last element are 0, and the last block is filled up with zeros. See codes.h for the order of the bytes
// in a block, and for what int8 and fp8 do with rounding, inf and nan.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/dtype.h"
#include "core/half.h"

namespace mlsys::packing {

// In the order of FORMS in mlsys_engine/activation/packing.py.
enum class Form : uint8_t { kMask = 0, kPositive = 1, kBFloat16 = 2, kInt8 = 3, kFp8 = 4 };
constexpr int64_t kNumForms = 5;

constexpr int64_t kBlock = 64;      // elements that share a step
constexpr int64_t kAlignment = 16;  // of a packed array

constexpr int64_t num_blocks(int64_t numel) { return (numel + kBlock - 1) / kBlock; }
// Where the steps of int8 and fp8 begin.
constexpr int64_t code_bytes(int64_t numel) { return num_blocks(numel) * kBlock; }

constexpr int64_t packed_bytes(Form form, int64_t numel) {
  switch (form) {
    case Form::kMask:
    case Form::kPositive:
      return (numel + 7) / 8;
    case Form::kBFloat16:
      return numel * 2;
    default:
      return code_bytes(numel) + num_blocks(numel) * static_cast<int64_t>(sizeof(float));
  }
}

constexpr bool takes(Form form, DType dtype) {
  const bool is_float = dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16;
  if (form == Form::kMask) return dtype == DType::kBool;
  return form == Form::kBFloat16 ? dtype == DType::kFloat32 : is_float;
}

[[noreturn]] inline void refuse(Form form, DType dtype) {
  throw std::invalid_argument("packing form " + std::to_string(static_cast<int>(form)) + " was given " +
                              name_of(dtype) +
                              ". See csrc/activation/pack/forms.h for what each form takes.");
}

// Calls body with a value of the float type of that name.
template <class Body>
void with_float(DType dtype, Body&& body) {
  if (dtype == DType::kFloat32) return body(float{});
  dtype == DType::kBFloat16 ? body(BFloat16{}) : body(Float16{});
}

}  // namespace mlsys::packing
