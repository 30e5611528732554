// What every operator checks about its tensors before the core sees raw pointers. Messages have three parts.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

namespace mlsys::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string describe(const Tensor& tensor) {
  std::string text = torch::headeronly::toString(tensor.scalar_type());
  text += " [";
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (dim > 0) text += ", ";
    text += std::to_string(tensor.size(dim));
  }
  return text + (tensor.is_cpu() ? "] on cpu" : "] on another device");
}

// A dense array of `dtype` that the core may walk from its first element; on the CPU unless `on_cpu` is
// false.
inline void check_flat(const Tensor& tensor, ScalarType dtype, const char* op, const char* name,
                       bool on_cpu = true) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.is_cpu() == on_cpu, op,
                  ": ", name, " is ", describe(tensor), tensor.is_contiguous() ? "" : ", not contiguous",
                  ". A contiguous ", torch::headeronly::toString(dtype), on_cpu ? " CPU" : " CUDA",
                  " tensor is expected. Convert it with .to(...).contiguous() before the call.");
}

// The arguments of sum_of_squares: a table of addresses and lengths, and where the sum goes.
inline void check_spans(const Tensor& spans, const Tensor& out, bool on_cpu) {
  check_flat(spans, ScalarType::Long, "sum_of_squares", "spans");
  check_flat(out, ScalarType::Double, "sum_of_squares", "out", on_cpu);
  STD_TORCH_CHECK(spans.dim() == 2 && spans.size(1) == 2 && out.numel() == 1, "sum_of_squares: spans is ",
                  describe(spans), " and out is ", describe(out),
                  ". [arrays, 2] and one element are expected. Call mlsys_engine.optim.sum_of_squares.");
}

}  // namespace mlsys::bindings
