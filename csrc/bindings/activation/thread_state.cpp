#include "bindings/activation/thread_state.h"

namespace py = pybind11;

namespace mlsys::activation {

namespace {

// What is found here is kept for the interpreter's lifetime. None of it is a Python frame, which
// torch.compile's callback would see.
PyObject* function_of(const char* module, const char* name) {
  return py::object(py::module_::import(module).attr(name)).release().ptr();
}

py::object result_of(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object set_compiler(const py::object& callback) {
  static PyObject* const set = function_of("torch._C._dynamo.eval_frame", "set_eval_frame");
  return result_of(PyObject_CallOneArg(set, callback.ptr()));
}

// Calls it in a destructor: an error on its way out survives, one of the call's own is printed.
template <typename Call>
void in_destructor(const Call& call) {
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  try {
    call();
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("activation checkpointing");
  }
  PyErr_Restore(type, value, traceback);
}

}  // namespace

py::object compiler_now() {
  static PyObject* const get = function_of("torch._C._dynamo.eval_frame", "get_eval_frame_callback");
  return result_of(PyObject_CallNoArgs(get));
}

CompilerSet::CompilerSet(const py::object& callback) {
  if (!compiler_now().is(callback)) outer_ = set_compiler(callback);
}

CompilerSet::~CompilerSet() {
  if (outer_) in_destructor([&] { set_compiler(outer_); });
}

bool is_transformed() {
  static PyObject* const peek = function_of("torch._C._functorch", "peek_interpreter_stack");
  return !result_of(PyObject_CallNoArgs(peek)).is_none();
}

TransformsSuspended::TransformsSuspended() {
  while (is_transformed()) {
    static PyObject* const pop = function_of("torch._C._functorch", "pop_dynamic_layer_stack");
    layers_.push_back(result_of(PyObject_CallNoArgs(pop)));
  }
}

TransformsSuspended::~TransformsSuspended() {
  if (layers_.empty()) return;
  in_destructor([&] {
    static PyObject* const push = function_of("torch._C._functorch", "push_dynamic_layer_stack");
    for (auto layer = layers_.rbegin(); layer != layers_.rend(); ++layer)
      result_of(PyObject_CallOneArg(push, layer->ptr()));
  });
}

}  // namespace mlsys::activation
