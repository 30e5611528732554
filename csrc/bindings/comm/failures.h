// How a failure of the core, or a refusal of the binding, becomes a Python exception of
// mlsys_engine/errors.py.
#pragma once

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

namespace mlsys::binding {

// The caller's mistake, in the three parts that every message has. Python sees errors.UserError.
struct Refused : std::runtime_error {
  Refused(std::string given, std::string expected, std::string action);
  std::string given, expected, action;
};

// What a rank was doing when something failed.
struct Place {
  std::string operation;  // "all_reduce"
  uint64_t sequence;      // counts the group's collectives, or its messages
  std::string words;      // "rank 1, all_reduce of group 0": how messages open
};

// The same failure as an exception that every road to Python understands: pybind11 (Work.wait, futures)
// through the registered translator, and torch's own converter, which autograd uses when DDP's reducer
// rethrows inside backward. `place` is what this rank was doing; the core names only the operation that met
// the failure first.
std::exception_ptr for_python(std::exception_ptr failure, const Place& place);

// Call once, with the GIL held.
void register_translators();

}  // namespace mlsys::binding
