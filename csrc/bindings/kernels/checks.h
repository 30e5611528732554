// What every operator checks about its tensors before the core sees raw pointers. Messages have three parts.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "optim/launch.h"

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

// `spans` is int64 [n, 2]: address and length of arrays, Span in memory, on the CPU.
inline const Span* spans_of(const Tensor& spans) { return static_cast<const Span*>(spans.const_data_ptr()); }

inline void check_span_table(const char* name, const Tensor& spans) {
  check_flat(spans, ScalarType::Long, name, "spans");
  STD_TORCH_CHECK(spans.dim() == 2 && spans.size(1) == 2, name, ": spans is ", describe(spans),
                  ". [arrays, 2] is expected. Call mlsys_engine.optim.sum_of_squares.");
}

inline int64_t num_terms(const Tensor& spans) {
  check_span_table("num_terms", spans);
  return mlsys::num_terms(spans_of(spans), spans.size(0));
}

// A table of addresses and lengths, and where `count` results go.
inline void check_spans(const char* name, const Tensor& spans, const Tensor& out, int64_t count,
                        bool on_cpu) {
  check_span_table(name, spans);
  check_flat(out, ScalarType::Double, name, "out", on_cpu);
  STD_TORCH_CHECK(out.numel() == count, name, ": out is ", describe(out), ". ", count,
                  " elements are expected: one, or one for each chunk of the arrays.");
}

// The form of the arrays behind a span table: float32, bfloat16 or float16.
inline Stored checked_form(const char* name, int64_t form) {
  STD_TORCH_CHECK(
      form >= 0 && form <= static_cast<int64_t>(Stored::kFloat16), name, ": form is ", form,
      ". 0 (float32), 1 (bfloat16) or 2 (float16) is expected. See mlsys_engine/optim/formats.py.");
  return static_cast<Stored>(form);
}

inline void check_terms(const Tensor& terms, const Tensor& out, bool on_cpu) {
  check_flat(terms, ScalarType::Double, "add_terms", "terms", on_cpu);
  check_flat(out, ScalarType::Double, "add_terms", "out", on_cpu);
  STD_TORCH_CHECK(out.numel() == 1, "add_terms: out is ", describe(out), ". One element is expected.");
}

}  // namespace mlsys::bindings
