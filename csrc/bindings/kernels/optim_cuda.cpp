// torch.ops.mlsys.* for the optimizers, CUDA. Compiled when torch has CUDA and nvcc exists (USE_CUDA).
#ifdef USE_CUDA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "bindings/kernels/checks.h"
#include "bindings/kernels/cuda_stream.h"
#include "optim/launch.h"

namespace mlsys::bindings {
namespace {

// Everything is on the device, `total_chunks` included in the host's call because the grid depends on it.
template <void (*step)(const cuda::StepLaunch&)>
void step_table_cuda(const Tensor& table, const Tensor& hyper, const Tensor& steps, const Tensor& control,
                     int64_t total_chunks) {
  check_flat(table, ScalarType::Long, "step", "table", /*on_cpu=*/false);
  check_flat(hyper, ScalarType::Double, "step", "hyper", /*on_cpu=*/false);
  check_flat(steps, ScalarType::Float, "step", "steps", /*on_cpu=*/false);
  check_flat(control, ScalarType::Double, "step", "control", /*on_cpu=*/false);
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == kSegmentColumns && hyper.dim() == 2 &&
                      hyper.size(1) == kHyperColumns && control.numel() == 2,
                  "step: table is ", describe(table), ", hyper is ", describe(hyper), ", control is ",
                  describe(control), ". [segments, ", kSegmentColumns, "], [rows, ", kHyperColumns,
                  "] and [2] are expected. Build them with mlsys_engine.optim.segments.");
  step({static_cast<const Segment*>(table.const_data_ptr()), table.size(0), total_chunks,
        static_cast<const double*>(hyper.const_data_ptr()), static_cast<const float*>(steps.const_data_ptr()),
        static_cast<const double*>(control.const_data_ptr()), current_stream(table)});
}

// `spans` is on the CPU (its rows travel in the kernel's arguments), the arrays and `out` are on the device.
void chunk_squares_cuda(const Tensor& spans, const Tensor& terms, int64_t form) {
  check_spans("chunk_squares", spans, terms, num_terms(spans), /*on_cpu=*/false);
  cuda::chunk_squares(spans_of(spans), spans.size(0), checked_form("chunk_squares", form),
                      static_cast<double*>(terms.mutable_data_ptr()), current_stream(terms));
}

void add_terms_cuda(const Tensor& terms, const Tensor& out) {
  check_terms(terms, out, /*on_cpu=*/false);
  cuda::add_terms(static_cast<const double*>(terms.const_data_ptr()), terms.numel(),
                  static_cast<double*>(out.mutable_data_ptr()), current_stream(out));
}

void sum_of_squares_cuda(const Tensor& spans, const Tensor& out, int64_t form) {
  check_spans("sum_of_squares", spans, out, 1, /*on_cpu=*/false);
  const Tensor terms =
      torch::stable::empty({num_terms(spans)}, ScalarType::Double, std::nullopt, out.device());
  chunk_squares_cuda(spans, terms, form);
  add_terms_cuda(terms, out);
}

}  // namespace
}  // namespace mlsys::bindings

STABLE_TORCH_LIBRARY_IMPL(mlsys, CUDA, m) {
  using namespace mlsys;
  using namespace mlsys::bindings;
#define MLSYS_IMPLEMENT(rule) m.impl(#rule "_step.device", TORCH_BOX(&step_table_cuda<cuda::rule##_step>));
  MLSYS_STEP_RULES(MLSYS_IMPLEMENT)
#undef MLSYS_IMPLEMENT
  m.impl("sum_of_squares", TORCH_BOX(&sum_of_squares_cuda));
  m.impl("chunk_squares", TORCH_BOX(&chunk_squares_cuda));
  m.impl("add_terms", TORCH_BOX(&add_terms_cuda));
}
#endif  // USE_CUDA
