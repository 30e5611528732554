#include "bindings/tensors/spans.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "bindings/tensors/reading.h"

namespace mlsys::binding {
namespace {

// What has been found so far.
struct Found {
  const c10::TensorImpl* first = nullptr;
  std::vector<int64_t> spans;
  std::vector<c10::Storage> held;

  bool fits(const c10::TensorImpl& gradient) {
    if (first == nullptr) first = &gradient;
    return is_plain_memory(gradient) && gradient.is_contiguous() && gradient.dtype() == first->dtype() &&
           gradient.device() == first->device();
  }

  // Appends the gradients of a block of parameters; false where one does not fit.
  bool append(PyObject* const* params, size_t count) {
    Block<c10::TensorImpl*> gradients;
    if (!std::all_of(params, params + count, is_plain_type)) return false;
    for (size_t i = 0; i < count; ++i) gradients[i] = gradient_of(*tensor_of(params[i]));
    for (size_t i = 0; i < count; ++i) {
      if (gradients[i] == nullptr) continue;
      if (!fits(*gradients[i])) return false;
      __builtin_prefetch(gradients[i]->unsafe_storage().unsafeGetStorageImpl());
    }
    for (size_t i = 0; i < count; ++i) {
      if (gradients[i] == nullptr) continue;
      spans.push_back(address_of(*gradients[i]));
      spans.push_back(gradients[i]->numel());
      held.push_back(gradients[i]->unsafe_storage());
    }
    return true;
  }
};

bool find(const pybind11::list& groups, Found& found) {
  for (const auto group : groups) {
    if (!PyList_Check(group.ptr())) return false;
    PyObject* const* params = reinterpret_cast<PyListObject*>(group.ptr())->ob_item;
    const auto size = static_cast<size_t>(PyList_GET_SIZE(group.ptr()));
    if (!for_blocks(size, [&](size_t begin, size_t count) { return found.append(params + begin, count); })) {
      return false;
    }
  }
  return found.first != nullptr;
}

}  // namespace

GradientSpans::~GradientSpans() { release_storages(held); }

std::unique_ptr<GradientSpans> gradient_spans(const pybind11::list& groups) {
  Found found;
  try {
    if (!find(groups, found)) return nullptr;
  } catch (const c10::Error&) {  // a tensor without memory: the caller's own way says which
    return nullptr;
  }
  const auto num_spans = static_cast<int64_t>(found.held.size());
  at::Tensor spans = at::empty({num_spans, 2}, at::kLong);
  std::memcpy(spans.mutable_data_ptr(), found.spans.data(), found.spans.size() * sizeof(int64_t));
  return std::make_unique<GradientSpans>(std::move(spans), found.first->dtype().toScalarType(),
                                         found.first->device(), std::move(found.held));
}

}  // namespace mlsys::binding
