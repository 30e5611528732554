#include "bindings/comm/call_site.h"

#include <pybind11/pybind11.h>

#include <array>
#include <string_view>

namespace mlsys::binding {
namespace py = pybind11;

std::vector<comm::Frame> python_frames() {
  constexpr size_t kMaxFrames = 32;
  std::vector<comm::Frame> frames;
  if (!Py_IsInitialized()) return frames;
  const py::gil_scoped_acquire locked;
  auto frame = py::reinterpret_steal<py::object>(
      reinterpret_cast<PyObject*>(PyThreadState_GetFrame(PyThreadState_Get())));
  while (frame && frames.size() < kMaxFrames) {
    auto* raw = reinterpret_cast<PyFrameObject*>(frame.ptr());
    const auto code = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetCode(raw)));
    frames.push_back({code.attr("co_name").cast<std::string>(), code.attr("co_filename").cast<std::string>(),
                      PyFrame_GetLineNumber(raw)});
    frame = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetBack(raw)));
  }
  return frames;
}

std::string call_site(const std::vector<comm::Frame>& frames) {
  constexpr std::array<std::string_view, 3> kOurs{"/torch/distributed/", "/torch/_", "/mlsys_engine/comm/"};
  for (const auto& frame : frames) {
    bool ours = false;
    for (const auto part : kOurs) ours |= frame.file.find(part) != std::string::npos;
    if (!ours) return frame.file + ":" + std::to_string(frame.line) + " in " + frame.function;
  }
  return "";
}

}  // namespace mlsys::binding
