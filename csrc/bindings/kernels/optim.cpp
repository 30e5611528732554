// torch.ops.mlsys.* for the optimizers, CPU: checks the tensors, then hands raw pointers to csrc/optim.
//
// The operators take addresses in a table, not lists of tensors: unpacking a list costs over a microsecond a
// tensor, more than stepping a thousand elements. mlsys_engine/optim/segments.py owns the tables, checks and
// keeps alive every tensor behind an address, and bumps the version counters that a schema with tensors would
// have bumped.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "bindings/kernels/checks.h"
#include "bindings/kernels/torch_pool.h"
#include "optim/adafactor.h"
#include "optim/launch.h"
#include "optim/step.h"

namespace mlsys::bindings {
namespace {

void check_table(const Tensor& table, const Tensor& hyper, const Tensor& steps) {
  check_flat(table, ScalarType::Long, "step", "table");
  check_flat(hyper, ScalarType::Double, "step", "hyper");
  check_flat(steps, ScalarType::Float, "step", "steps");
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == kSegmentColumns && hyper.dim() == 2 &&
                      hyper.size(1) == kHyperColumns,
                  "step: table is ", describe(table), " and hyper is ", describe(hyper), ". [segments, ",
                  kSegmentColumns, "] and [rows, ", kHyperColumns,
                  "] are expected. Build them with mlsys_engine.optim.segments.");
  const auto* segments = static_cast<const Segment*>(table.const_data_ptr());
  for (int64_t i = 0; i < table.size(0); ++i) {
    STD_TORCH_CHECK(segments[i].hyper_row >= 0 && segments[i].hyper_row < hyper.size(0) &&
                        segments[i].step_index >= 0 && segments[i].step_index < steps.numel(),
                    "step: segment ", i, " names hyper row ", segments[i].hyper_row, " and step ",
                    segments[i].step_index, ". There are ", hyper.size(0), " rows and ", steps.numel(),
                    " steps. Build the table with mlsys_engine.optim.segments.");
  }
}

template <void (*step)(const StepArguments&)>
void step_table(const Tensor& table, const Tensor& hyper, const Tensor& steps, double grad_scale) {
  check_table(table, hyper, steps);
  step({static_cast<const Segment*>(table.const_data_ptr()), table.size(0),
        static_cast<const double*>(hyper.const_data_ptr()), static_cast<const float*>(steps.const_data_ptr()),
        grad_scale, torch_pool});
}

// The same step under the contract of the kernels on a device: `control` is {grad_scale, skip}.
template <void (*step)(const StepArguments&)>
void step_table_by_control(const Tensor& table, const Tensor& hyper, const Tensor& steps,
                           const Tensor& control, int64_t total_chunks) {
  check_table(table, hyper, steps);
  check_flat(control, ScalarType::Double, "step", "control");
  STD_TORCH_CHECK(control.numel() == 2, "step: control is ", describe(control),
                  ". [2] is expected: {grad_scale, skip}.");
  const int64_t last = table.size(0) - 1;
  const auto* segments = static_cast<const Segment*>(table.const_data_ptr());
  const int64_t chunks = last < 0 ? 0 : segments[last].first_chunk + num_chunks(segments[last].numel);
  STD_TORCH_CHECK(chunks == total_chunks, "step: the table has ", chunks, " chunks and total_chunks is ",
                  total_chunks, ". They are equal. Count them with mlsys_engine.optim.segments.");
  const auto* scalars = static_cast<const double*>(control.const_data_ptr());
  if (scalars[1] == 0.0) step_table<step>(table, hyper, steps, scalars[0]);
}

void adafactor_table(const Tensor& table, const Tensor& hyper, const Tensor& steps, double grad_scale) {
  check_flat(table, ScalarType::Long, "adafactor_step", "table");
  check_flat(hyper, ScalarType::Double, "adafactor_step", "hyper");
  check_flat(steps, ScalarType::Float, "adafactor_step", "steps");
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == kAdafactorColumns && hyper.dim() == 2 &&
                      hyper.size(1) == kHyperColumns,
                  "adafactor_step: table is ", describe(table), " and hyper is ", describe(hyper),
                  ". [tensors, ", kAdafactorColumns, "] and [rows, ", kHyperColumns,
                  "] are expected. Build them with mlsys_engine.optim.rules.adafactor.");
  const auto* tensors = static_cast<const AdafactorTensor*>(table.const_data_ptr());
  for (int64_t i = 0; i < table.size(0); ++i) {
    STD_TORCH_CHECK(tensors[i].hyper_row >= 0 && tensors[i].hyper_row < hyper.size(0) &&
                        tensors[i].step_index >= 0 && tensors[i].step_index < steps.numel(),
                    "adafactor_step: tensor ", i, " names hyper row ", tensors[i].hyper_row, " and step ",
                    tensors[i].step_index, ". There are ", hyper.size(0), " rows and ", steps.numel(),
                    " steps. Build the table with mlsys_engine.optim.rules.adafactor.");
  }
  adafactor_step({tensors, table.size(0), static_cast<const double*>(hyper.const_data_ptr()),
                  static_cast<const float*>(steps.const_data_ptr()), grad_scale, torch_pool});
}

void sum_of_squares_cpu(const Tensor& spans, const Tensor& out, int64_t form) {
  check_spans("sum_of_squares", spans, out, 1, /*on_cpu=*/true);
  *static_cast<double*>(out.mutable_data_ptr()) =
      sum_of_squares(spans_of(spans), spans.size(0), checked_form("sum_of_squares", form), torch_pool);
}

void chunk_squares_cpu(const Tensor& spans, const Tensor& terms, int64_t form) {
  check_spans("chunk_squares", spans, terms, num_terms(spans), /*on_cpu=*/true);
  chunk_squares(spans_of(spans), spans.size(0), checked_form("chunk_squares", form),
                static_cast<double*>(terms.mutable_data_ptr()), torch_pool);
}

void add_terms_cpu(const Tensor& terms, const Tensor& out) {
  check_terms(terms, out, /*on_cpu=*/true);
  *static_cast<double*>(out.mutable_data_ptr()) =
      add_terms(static_cast<const double*>(terms.const_data_ptr()), terms.numel());
}

}  // namespace
}  // namespace mlsys::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(mlsys, m) {
  m.def("sum_of_squares(Tensor spans, Tensor(a!) out, int form=0) -> ()");
  m.def("chunk_squares(Tensor spans, Tensor(a!) terms, int form=0) -> ()");
  m.def("add_terms(Tensor terms, Tensor(a!) out) -> ()");
#define MLSYS_DEFINE(rule)                                                                \
  m.def(#rule "_step(Tensor table, Tensor hyper, Tensor steps, float grad_scale) -> ()"); \
  m.def(#rule                                                                             \
        "_step.device(Tensor table, Tensor hyper, Tensor steps, Tensor control, int total_chunks) -> ()");
  MLSYS_STEP_RULES(MLSYS_DEFINE)
#undef MLSYS_DEFINE
  m.def("adafactor_step(Tensor table, Tensor hyper, Tensor steps, float grad_scale) -> ()");
  m.def("stream_probe_step(Tensor table, Tensor hyper, Tensor steps, float grad_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mlsys, CPU, m) {
  using namespace mlsys;
  using namespace mlsys::bindings;
  m.impl("sum_of_squares", TORCH_BOX(&sum_of_squares_cpu));
  m.impl("chunk_squares", TORCH_BOX(&chunk_squares_cpu));
  m.impl("add_terms", TORCH_BOX(&add_terms_cpu));
#define MLSYS_IMPLEMENT(rule)                                 \
  m.impl(#rule "_step", TORCH_BOX(&step_table<rule##_step>)); \
  m.impl(#rule "_step.device", TORCH_BOX(&step_table_by_control<rule##_step>));
  MLSYS_STEP_RULES(MLSYS_IMPLEMENT)
#undef MLSYS_IMPLEMENT
  m.impl("adafactor_step", TORCH_BOX(&adafactor_table));
  m.impl("stream_probe_step", TORCH_BOX(&step_table<stream_probe_step>));
}
