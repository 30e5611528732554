// What torch keeps for a thread and a second run must find as the first: torch.compile and torch.func. Both
// are reached through functions of torch's Python modules, since their headers are not shipped.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/pybind11.h>

#include <vector>

namespace mlsys::activation {

// Inside a compiled function torch evaluates Python frames through a callback of the thread. A backward has
// none, or the one of whoever called it, and compiled code saves other tensors than plain code: a block that
// was compiled in its first run has to be in the second one, too. None without torch.compile.
pybind11::object compiler_now();

// While it lives, the thread has this callback.
class CompilerSet {
 public:
  explicit CompilerSet(const pybind11::object& callback);
  ~CompilerSet();
  CompilerSet(const CompilerSet&) = delete;
  CompilerSet& operator=(const CompilerSet&) = delete;

 private:
  pybind11::object outer_;  // null when nothing was changed
};

// Whether the thread is inside a transformation of torch.func.
bool is_transformed();

// While it lives, no transformation of torch.func is in force, such as a vmap around a backward.
class TransformsSuspended {
 public:
  TransformsSuspended();
  ~TransformsSuspended();
  TransformsSuspended(const TransformsSuspended&) = delete;
  TransformsSuspended& operator=(const TransformsSuspended&) = delete;

 private:
  c10::impl::ExcludeDispatchKeyGuard older_{
      c10::DispatchKey::VmapMode};        // of autograd.grad(is_grads_batched)
  std::vector<pybind11::object> layers_;  // innermost first
};

}  // namespace mlsys::activation
