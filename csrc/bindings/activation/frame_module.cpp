// Binds the recompute frame and the chains of frames.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/activation/bind.h"
#include "bindings/activation/frame.h"
#include "bindings/activation/frame_chain.h"
#include "bindings/activation/hooks.h"

namespace py = pybind11;

namespace mlsys::activation {
namespace {

std::shared_ptr<FrameChain> make_chain(
    std::vector<bool> linked, const std::vector<std::vector<std::pair<size_t, std::string>>>& before) {
  static const std::map<std::string, Frame::Keep> kKeeps = {
      {"nothing", Frame::Keep::kNothing}, {"inputs", Frame::Keep::kInputs}, {"saved", Frame::Keep::kSaved}};
  std::vector<std::vector<FrameChainStep>> steps;
  for (const auto& list : before) {
    std::vector<FrameChainStep>& converted = steps.emplace_back();
    for (const auto& [position, keep] : list) converted.push_back({position, kKeeps.at(keep)});
  }
  return std::make_shared<FrameChain>(std::move(linked), std::move(steps));
}

// Places are (dictionary, key, name, whether it is a parameter's).
std::shared_ptr<Part> make_part(const std::vector<std::tuple<py::dict, py::str, std::string, bool>>& places) {
  auto part = std::make_shared<Part>();
  for (const auto& [owner, leaf, name, is_parameter] : places)
    part->places.push_back({owner, leaf, name, is_parameter});
  return part;
}

}  // namespace

void bind_frame(py::module_& module) {
  prepare_hook_types();
  py::class_<Hooks, std::shared_ptr<Hooks>>(module, "Hooks")
      .def(py::init([](py::object open, py::object stop_recompute, py::object mismatch_error,
                       py::object transform_error, py::object checksum) {
             return std::make_shared<Hooks>(Hooks{std::move(open), std::move(stop_recompute),
                                                  std::move(mismatch_error), std::move(transform_error),
                                                  std::move(checksum)});
           }),
           py::arg("open"), py::arg("stop_recompute"), py::arg("mismatch_error"), py::arg("transform_error"),
           py::arg("checksum"));
  py::class_<Part, std::shared_ptr<Part>>(module, "Part").def(py::init(&make_part), py::arg("places"));
  py::class_<FrameChain, std::shared_ptr<FrameChain>>(module, "FrameChain")
      .def(py::init(&make_chain), py::arg("linked"), py::arg("before"));
  module.def(
      "run",
      [](std::shared_ptr<Hooks> hooks, std::string name, py::object fn, std::shared_ptr<Part> part,
         const std::shared_ptr<FrameChain>& chain, size_t position, const py::tuple& positional,
         const py::dict& keywords, py::object buffers, py::object observe) {
        Region region{std::move(name), std::move(fn), std::move(part), std::move(hooks)};
        return run(std::move(region), chain, position, positional, keywords, std::move(buffers),
                   std::move(observe));
      },
      py::arg("hooks"), py::arg("name"), py::arg("fn"), py::arg("part"), py::arg("chain").none(true),
      py::arg("position"), py::arg("positional"), py::arg("keywords"), py::arg("buffers"),
      py::arg("observe"));
}

}  // namespace mlsys::activation
