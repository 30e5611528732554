// What the optimizers ask of thousands of tensors at every step, read straight from the tensor objects.
//
// Through Python each question costs a call and, after a step's data has passed through the caches, several
// fetches from memory one after another: object, tensor, storage. Here they are read a block at a time, one
// indirection for the whole block before the next, so that the processor waits for many fetches at once.
//
// Everything runs under the GIL. Nothing is answered about tensors that are more than a stretch of memory
// (wrappers of functorch, subclasses with their own dispatch, lazy negation): the caller's Python knows
// those.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>
#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace mlsys::binding {

// Long enough to keep all of a core's outstanding fetches busy, short enough to stay in its first-level
// cache.
constexpr size_t kBlock = 32;
template <class T>
using Block = std::array<T, kBlock>;

// Calls visit(begin, count) for the blocks of [0, size) until one of them returns false.
template <class Visit>
bool for_blocks(size_t size, Visit&& visit) {
  for (size_t begin = 0; begin < size; begin += kBlock) {
    if (!visit(begin, std::min(kBlock, size - begin))) return false;
  }
  return true;
}

inline bool is_plain_type(PyObject* object) {
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == ParameterClass || type == THPVariableClass;
}

// Whether an address and a length say everything about the tensor's elements.
inline bool is_plain_memory(const c10::TensorImpl& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kMore({DispatchKey::Python, DispatchKey::Conjugate, DispatchKey::Negative,
                                       DispatchKey::ZeroTensor, DispatchKey::Functionalize,
                                       DispatchKey::FuncTorchBatched, DispatchKey::FuncTorchGradWrapper});
  return tensor.layout() == c10::kStrided && tensor.has_storage() && !tensor.key_set().has_any(kMore);
}

inline c10::TensorImpl* tensor_of(PyObject* object) {
  return THPVariable_Unpack(object).unsafeGetTensorImpl();
}

// Tensor.data_ptr().
inline int64_t address_of(c10::TensorImpl& tensor) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.mutable_data()));
}

// The gradient, or null. Reads the leaf's field and not Tensor::grad(), which is a call into another library.
inline c10::TensorImpl* gradient_of(const c10::TensorImpl& tensor) {
  const auto* meta = static_cast<const torch::autograd::AutogradMeta*>(tensor.autograd_meta());
  return meta != nullptr && meta->grad_.defined() ? meta->grad_.unsafeGetTensorImpl() : nullptr;
}

// Releases memory that was held for a while. Its counts have left the caches, and a decrement waits for its
// own fetch before the next one begins: so they are read first.
inline void release_storages(std::vector<c10::Storage>& held) {
  for_blocks(held.size(), [&](size_t begin, size_t count) {
    for (size_t i = begin; i < begin + count; ++i) __builtin_prefetch(held[i].unsafeGetStorageImpl(), 1);
    for (size_t i = begin; i < begin + count; ++i) held[i] = c10::Storage();
    return true;
  });
  held.clear();
}

}  // namespace mlsys::binding
