#include "bindings/tensors/watch.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "bindings/tensors/reading.h"

namespace mlsys::binding {
namespace {

std::vector<PyObject*> items_of(const py::list& list) {
  std::vector<PyObject*> items(list.size());
  for (size_t i = 0; i < items.size(); ++i) items[i] = PyList_GET_ITEM(list.ptr(), i);
  return items;
}

// A small dictionary's table follows its header within three cache lines.
void prefetch_entries(PyObject* dict) {
  const auto* table = reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(dict)->ma_keys);
  for (int line = 0; line < 3; ++line) __builtin_prefetch(table + 64 * line);
}

}  // namespace

std::unique_ptr<Watch> Watch::make(const Subjects& subjects) {
  try {
    std::unique_ptr<Watch> watch(new Watch(subjects));
    // They may have been stepped with other gradients than their own, of which nothing is known.
    const bool own = watch->is_plain() && watch->look_at_gradients();
    watch->release();
    return own ? std::move(watch) : nullptr;
  } catch (const c10::Error&) {  // a tensor without memory
    return nullptr;
  }
}

Watch::Watch(const Subjects& subjects)
    : subjects_(subjects), params_(items_of(subjects.params)), watched_(items_of(subjects.watched)) {
  if (!is_plain()) return;
  const std::vector<PyObject*> gradients = items_of(subjects.gradients);
  int64_t num_present = 0;
  for (size_t i = 0; i < params_.size(); ++i) {
    const bool present = gradients[i] != Py_None;
    kinds_.push_back(present ? kind_of(*tensor_of(gradients[i])) : Kind{});
    num_present += present ? 1 : 0;
    c10::TensorImpl& tensor = *tensor_of(params_[i]);
    homes_.push_back(address_of(tensor));
    first_layouts_.push_back(layouts_.size());
    layouts_.insert(layouts_.end(), tensor.sizes().begin(), tensor.sizes().end());
    layouts_.insert(layouts_.end(), tensor.strides().begin(), tensor.strides().end());
  }
  first_layouts_.push_back(layouts_.size());
  for (PyObject* object : watched_) places_.push_back(address_of(*tensor_of(object)));
  for (const auto item : subjects.state) states_.push_back(py::reinterpret_borrow<py::object>(item.second));
  for (const py::object& state : states_) {
    for (const auto item : py::reinterpret_borrow<py::dict>(state)) {
      entries_.push_back(py::reinterpret_borrow<py::object>(item.first));
      entries_.push_back(py::reinterpret_borrow<py::object>(item.second));
    }
    num_entries_.push_back(py::len(state));
  }
  addresses_ = at::empty({num_present}, at::kLong);
  held_.reserve(static_cast<size_t>(num_present));
}

Watch::Kind Watch::kind_of(const c10::TensorImpl& tensor) {
  return {tensor.key_set().raw_repr(), tensor.dtype(), tensor.device().index(), true};
}

bool Watch::is_plain() const {
  const auto is_memory = [](PyObject* object) {
    return THPVariable_Check(object) && is_plain_memory(*tensor_of(object));
  };
  const auto is_known = [&](PyObject* object) { return is_plain_type(object) && is_memory(object); };
  const auto items = items_of(subjects_.gradients);
  return std::all_of(params_.begin(), params_.end(), is_known) &&
         std::all_of(watched_.begin(), watched_.end(), is_memory) &&
         std::all_of(items.begin(), items.end(),
                     [&](PyObject* object) { return object == Py_None || is_memory(object); }) &&
         std::all_of(subjects_.state.begin(), subjects_.state.end(),
                     [](const auto& item) { return PyDict_Check(item.second.ptr()); });
}

bool Watch::look(const py::list& groups) {
  release();
  try {
    if (same_parameters(groups) && same_state() && same_places() && look_at_gradients()) return true;
  } catch (const c10::Error&) {  // a tensor without memory: the caller's own way says which
  }
  release();
  return false;
}

bool Watch::same_parameters(const py::list& groups) const {
  size_t position = 0;
  for (const auto group : groups) {
    if (!PyList_Check(group.ptr())) return false;
    const auto count = static_cast<size_t>(PyList_GET_SIZE(group.ptr()));
    if (count > params_.size() - position) return false;
    for (size_t i = 0; i < count; ++i, ++position) {
      if (PyList_GET_ITEM(group.ptr(), i) != params_[position]) return false;
    }
  }
  return position == params_.size();
}

bool Watch::same_state() const {
  if (subjects_.state.size() != states_.size()) return false;
  size_t position = 0;
  for (const auto item : subjects_.state) {
    if (!item.second.is(states_[position++])) return false;
  }
  // Entry by entry in their order, which costs a fifth of looking keys up.
  const py::object* entry = entries_.data();
  return for_blocks(states_.size(), [&](size_t begin, size_t count) {
    for (size_t i = begin; i < begin + count; ++i) prefetch_entries(states_[i].ptr());
    for (size_t i = begin; i < begin + count; ++i) {
      if (static_cast<size_t>(PyDict_GET_SIZE(states_[i].ptr())) != num_entries_[i]) return false;
      Py_ssize_t place = 0;
      for (PyObject *key, *value; PyDict_Next(states_[i].ptr(), &place, &key, &value); entry += 2) {
        if (key != entry[0].ptr() || value != entry[1].ptr()) return false;
      }
    }
    return true;
  });
}

bool Watch::same_places() const {
  return for_blocks(watched_.size(), [&](size_t begin, size_t count) {
    Block<c10::TensorImpl*> tensors;
    for (size_t i = 0; i < count; ++i) tensors[i] = tensor_of(watched_[begin + i]);
    for (size_t i = 0; i < count; ++i) {
      if (address_of(*tensors[i]) != places_[begin + i]) return false;
    }
    return true;
  });
}

bool Watch::same_layout(const c10::TensorImpl& tensor, size_t index) const {
  const int64_t* sizes = layouts_.data() + first_layouts_[index];
  const size_t dims = (first_layouts_[index + 1] - first_layouts_[index]) / 2;
  if (static_cast<size_t>(tensor.dim()) != dims) return false;
  const auto own_sizes = tensor.sizes(), own_strides = tensor.strides();
  for (size_t dim = 0; dim < dims; ++dim) {
    // The stride of a dimension of one element is never used.
    if (own_sizes[dim] != sizes[dim] || (sizes[dim] != 1 && own_strides[dim] != sizes[dims + dim])) {
      return false;
    }
  }
  return true;
}

bool Watch::look_at_gradients() {
  auto* out = addresses_.mutable_data_ptr<int64_t>();
  return for_blocks(params_.size(), [&](size_t begin, size_t count) {
    Block<c10::TensorImpl*> tensors, gradients;
    for (size_t i = 0; i < count; ++i) tensors[i] = tensor_of(params_[begin + i]);
    for (size_t i = 0; i < count; ++i) {
      gradients[i] = gradient_of(*tensors[i]);
      if (address_of(*tensors[i]) != homes_[begin + i]) return false;
      if (!same_layout(*tensors[i], begin + i)) return false;
    }
    for (size_t i = 0; i < count; ++i) {
      const Kind& kind = kinds_[begin + i];
      if ((gradients[i] != nullptr) != kind.present) return false;
      if (!kind.present) continue;
      if (!(kind_of(*gradients[i]) == kind) || !same_layout(*gradients[i], begin + i)) return false;
      __builtin_prefetch(gradients[i]->unsafe_storage().unsafeGetStorageImpl());
    }
    for (size_t i = 0; i < count; ++i) {
      if (gradients[i] == nullptr) continue;
      *out++ = address_of(*gradients[i]);
      held_.push_back(gradients[i]->unsafe_storage());
    }
    return true;
  });
}

void Watch::release() { release_storages(held_); }

}  // namespace mlsys::binding
