// Where the gradients of many parameters lie: the table of a norm pass.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <utility>
#include <vector>

namespace mlsys::binding {

// Keeps the gradients' memory for as long as it lives.
struct GradientSpans {
  GradientSpans(at::Tensor table, at::ScalarType type, at::Device place, std::vector<c10::Storage> memory)
      : spans(std::move(table)), dtype(type), device(place), held(std::move(memory)) {}
  GradientSpans(const GradientSpans&) = delete;
  GradientSpans& operator=(const GradientSpans&) = delete;
  ~GradientSpans();

  at::Tensor spans;  // int64 [gradients, 2]: addresses and lengths
  at::ScalarType dtype;
  at::Device device;
  std::vector<c10::Storage> held;
};

// The present gradients of lists of parameters, in order. Null where there are none, where they differ in
// type or device, and where one is more than a stretch of memory in its own order.
std::unique_ptr<GradientSpans> gradient_spans(const pybind11::list& groups);

}  // namespace mlsys::binding
