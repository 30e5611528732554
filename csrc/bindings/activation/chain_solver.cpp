// The budget solver for Python. mlsys_engine/activation/solver.py is its only caller and checks its
// arguments.
#include "activation/chain_solver.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/activation/bind.h"

namespace py = pybind11;

namespace mlsys::activation {
namespace {

// The steps as (action, block, option) in three lists would be long-winded; one list of tuples is read once.
std::vector<std::tuple<int32_t, int32_t, int32_t>> steps_of(const Schedule& schedule) {
  std::vector<std::tuple<int32_t, int32_t, int32_t>> steps;
  steps.reserve(schedule.steps.size());
  for (const Step& step : schedule.steps) {
    steps.emplace_back(static_cast<int32_t>(step.action), step.block, step.option);
  }
  return steps;
}

}  // namespace

void bind_chain_solver(py::module_& module) {
  py::class_<OptionCosts>(module, "OptionCosts")
      .def(py::init([](double forward_s, double backward_s, int64_t saved_bytes, int64_t forward_peak_bytes,
                       int64_t backward_peak_bytes) {
             return OptionCosts{forward_s, backward_s, saved_bytes, forward_peak_bytes, backward_peak_bytes};
           }),
           py::kw_only(), py::arg("forward_s"), py::arg("backward_s"), py::arg("saved_bytes"),
           py::arg("forward_peak_bytes"), py::arg("backward_peak_bytes"));
  py::class_<BlockCosts>(module, "BlockCosts")
      .def(py::init([](int64_t input_bytes, bool splittable, double drop_forward_s, int64_t drop_peak_bytes,
                       int64_t output_gradient_bytes, std::vector<OptionCosts> options) {
             return BlockCosts{input_bytes,           splittable,        drop_forward_s, drop_peak_bytes,
                               output_gradient_bytes, std::move(options)};
           }),
           py::kw_only(), py::arg("input_bytes"), py::arg("splittable"), py::arg("drop_forward_s"),
           py::arg("drop_peak_bytes"), py::arg("output_gradient_bytes"), py::arg("options"));
  py::class_<Schedule>(module, "Schedule")
      .def_property_readonly("steps", &steps_of)
      .def_readonly("seconds", &Schedule::seconds)
      .def_readonly("peak_bytes", &Schedule::peak_bytes);
  py::class_<Solution>(module, "Solution")
      .def_readonly("least_bytes", &Solution::least_bytes)
      .def_readonly("enough_bytes", &Solution::enough_bytes)
      .def_readonly("unit_bytes", &Solution::unit_bytes)
      .def_readonly("num_slots", &Solution::num_slots)
      .def_readonly("num_problems", &Solution::num_problems)
      .def_readonly("schedules", &Solution::schedules);
  module.def("solve_chain", &solve, py::arg("chain"), py::arg("budgets"), py::arg("num_slots") = 0,
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace mlsys::activation
