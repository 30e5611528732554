#include "bindings/activation/hooks.h"

#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>

#include <new>
#include <stdexcept>

#include "bindings/activation/autograd.h"

namespace py = pybind11;

namespace mlsys::activation {

namespace {

struct HookObject {
  PyObject_HEAD;
  std::shared_ptr<Frame> frame;
  HookKind kind;
};

// Runs `body`, and turns what it throws into a Python error.
template <typename Body>
PyObject* guarded(const Body& body) {
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (python_error& error) {  // of a hook that torch called for us, such as an enclosing frame's
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <typename Object>
void destroy(PyObject* self) {
  auto* object = reinterpret_cast<Object*>(self);
  PyTypeObject* type = Py_TYPE(self);
  object->~Object();
  PyObject_Free(self);
  Py_DECREF(type);
}

void destroy_slot(PyObject* self) {
  auto* slot = reinterpret_cast<SlotObject*>(self);
  slot->frame->forget(slot->index);
  destroy<SlotObject>(self);
}

PyObject* call_hook(PyObject* self, PyObject* arguments, PyObject*) {
  auto& hook = *reinterpret_cast<HookObject*>(self);
  return guarded([&]() -> PyObject* {
    PyObject* argument = PyTuple_GET_ITEM(arguments, 0);
    const at::Tensor& tensor = tensor_of(argument);
    if (hook.kind == HookKind::kPack) return hook.frame->pack(tensor);
    const bool keeps = hook.kind == HookKind::kStore;
    if (keeps || hook.frame->compares()) hook.frame->store(tensor, keeps);
    Py_RETURN_NONE;
  });
}

PyObject* unpack_slot(PyObject*, PyObject* self) {
  return guarded([&] {
    auto& slot = *reinterpret_cast<SlotObject*>(self);
    const std::shared_ptr<Frame> frame = slot.frame;  // stays alive while it recomputes
    return object_of(frame->unpack(slot));
  });
}

PyObject* refuse_unpack(PyObject*, PyObject*) {
  PyErr_SetString(PyExc_RuntimeError,
                  "Activation checkpointing: a checkpointed block ran a backward of its own. A block that is "
                  "run again cannot: "
                  "compute that gradient outside of the block, or leave the block out with apply_actions.");
  return nullptr;
}

PyType_Slot hook_slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(destroy<HookObject>)},
                            {Py_tp_call, reinterpret_cast<void*>(call_hook)},
                            {0, nullptr}};
PyType_Spec hook_spec = {"mlsys_engine.native._activation.SavedTensorHook", sizeof(HookObject), 0,
                         Py_TPFLAGS_DEFAULT, hook_slots};
PyType_Slot slot_slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(destroy_slot)}, {0, nullptr}};
PyType_Spec slot_spec = {"mlsys_engine.native._activation.Slot", sizeof(SlotObject), 0, Py_TPFLAGS_DEFAULT,
                         slot_slots};
PyMethodDef unpack_definition = {"unpack", unpack_slot, METH_O,
                                 "The tensor of a slot, recomputed when need be."};
PyMethodDef refuse_definition = {"refuse_unpack", refuse_unpack, METH_O, "Raises: see its message."};

// Made once and never freed: types and functions of the interpreter's lifetime.
PyTypeObject* hook_type = nullptr;
PyTypeObject* slot_type = nullptr;
PyObject* unpack_function = nullptr;
PyObject* refuse_function = nullptr;

template <typename Object>
Object* allocate(PyTypeObject* type) {
  PyObject* memory = PyType_GenericAlloc(type, 0);
  if (memory == nullptr) throw py::error_already_set();
  return reinterpret_cast<Object*>(memory);
}

PyObject* make_hook(std::shared_ptr<Frame> frame, HookKind kind) {
  auto* hook = allocate<HookObject>(hook_type);
  new (&hook->frame) std::shared_ptr<Frame>(std::move(frame));
  hook->kind = kind;
  return reinterpret_cast<PyObject*>(hook);
}

}  // namespace

PyObject* make_slot(std::shared_ptr<Frame> frame, size_t index) {
  auto* slot = allocate<SlotObject>(slot_type);
  new (&slot->frame) std::shared_ptr<Frame>(std::move(frame));
  slot->index = index;
  new (&slot->stored) std::vector<std::pair<int64_t, Stored>>();
  return reinterpret_cast<PyObject*>(slot);
}

SavedTensorHooks::SavedTensorHooks(std::shared_ptr<Frame> frame, HookKind kind) {
  at::SavedTensorDefaultHooks::lazy_initialize();
  PyObject* unpack = kind == HookKind::kPack ? unpack_function : refuse_function;
  Py_INCREF(unpack);
  c10::SafePyObject unpack_hook(unpack, getPyInterpreter());
  c10::SafePyObject pack_hook(make_hook(std::move(frame), kind), getPyInterpreter());
  at::SavedTensorDefaultHooks::push_hooks(std::move(pack_hook), std::move(unpack_hook));
}

SavedTensorHooks::~SavedTensorHooks() { at::SavedTensorDefaultHooks::pop_hooks(); }

void prepare_hook_types() {
  hook_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&hook_spec));
  slot_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&slot_spec));
  unpack_function = PyCFunction_New(&unpack_definition, nullptr);
  refuse_function = PyCFunction_New(&refuse_definition, nullptr);
  if (hook_type == nullptr || slot_type == nullptr || unpack_function == nullptr ||
      refuse_function == nullptr) {
    throw py::error_already_set();
  }
}

}  // namespace mlsys::activation
