// The Python module mlsys_engine.native._tensors: looks at thousands of tensors in one call.
#include <torch/csrc/utils/pybind.h>

#include "bindings/tensors/reading.h"
#include "bindings/tensors/spans.h"
#include "bindings/tensors/watch.h"

namespace mlsys::binding {
namespace {

// torch.autograd.graph.increment_version, for a list. A counter is a fetch of its own, and an atomic
// increment would wait for it alone: all of a block are read before the first one is written.
void increment_versions(const py::list& tensors) {
  for (const auto tensor : tensors)
    TORCH_CHECK_TYPE(THPVariable_Check(tensor.ptr()), "A tensor is expected.");
  PyObject* const* items = reinterpret_cast<PyListObject*>(tensors.ptr())->ob_item;
  for_blocks(tensors.size(), [&](size_t begin, size_t count) {
    Block<c10::TensorImpl*> block;
    uint32_t read = 0;
    for (size_t i = 0; i < count; ++i) block[i] = tensor_of(items[begin + i]);
    for (size_t i = 0; i < count; ++i) {
      if (!block[i]->is_inference()) read += block[i]->version_counter().current_version();
    }
    asm volatile("" ::"r"(read));  // the reads are wanted for themselves
    for (size_t i = 0; i < count; ++i) {
      if (!block[i]->is_inference()) block[i]->bump_version();
    }
    return true;
  });
}

}  // namespace
}  // namespace mlsys::binding

PYBIND11_MODULE(_tensors, m) {
  using namespace mlsys::binding;
  py::module_::import("torch");  // its types, which the functions below return

  py::class_<GradientSpans>(m, "GradientSpans")
      .def_readonly("spans", &GradientSpans::spans)
      .def_property_readonly("dtype", [](const GradientSpans& found) { return found.dtype; })
      .def_property_readonly("device", [](const GradientSpans& found) { return found.device; });
  m.def("gradient_spans", &gradient_spans, py::arg("groups"));

  py::class_<Watch>(m, "Watch")
      .def_property_readonly("addresses", &Watch::addresses)
      .def("look", &Watch::look, py::arg("groups"))
      .def("release", &Watch::release);
  m.def(
      "watch",
      [](py::list params, py::list gradients, py::list watched, py::dict state) {
        return Watch::make({std::move(params), std::move(gradients), std::move(watched), std::move(state)});
      },
      py::kw_only(), py::arg("params"), py::arg("gradients"), py::arg("watched"), py::arg("state"));
  m.def("increment_versions", &increment_versions, py::arg("tensors"));
}
