// The Python objects that autograd's saved-tensor hooks consist of, written against the C API: they are
// called once for every saved tensor, and a call through pybind11 costs several times as much.
#pragma once

#include <Python.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "bindings/activation/frame.h"

namespace mlsys::activation {

// What autograd keeps in place of a saved tensor.
struct SlotObject {
  PyObject_HEAD;
  std::shared_ptr<Frame> frame;
  size_t index;
  std::vector<std::pair<int64_t, Stored>> stored;  // graph task -> recomputed tensor
};

PyObject* make_slot(std::shared_ptr<Frame> frame, size_t index);

// While it lives, tensors that autograd saves in this thread go to the frame.
enum class HookKind : uint8_t { kPack, kStore, kDrop };
class SavedTensorHooks {
 public:
  SavedTensorHooks(std::shared_ptr<Frame> frame, HookKind kind);
  ~SavedTensorHooks();
  SavedTensorHooks(const SavedTensorHooks&) = delete;
  SavedTensorHooks& operator=(const SavedTensorHooks&) = delete;
};

// Makes the types ready; called once when the module is imported.
void prepare_hook_types();

}  // namespace mlsys::activation
