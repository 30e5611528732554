#include "bindings/activation/module_tensors.h"

namespace py = pybind11;

namespace mlsys::activation {

namespace {

PyObject* present(const ModuleTensorPlace& place) {  // borrowed; null where nothing is
  return PyDict_GetItemWithError(place.owner.ptr(), place.leaf.ptr());
}

bool has_tensor(PyObject* object) { return object != nullptr && is_tensor(object); }

}  // namespace

ModuleTensors::ModuleTensors(const ModuleTensorPlaces& places) : places_(places) {
  tensors_.reserve(places.size());
  for (const ModuleTensorPlace& place : places) {
    PyObject* object = present(place);
    tensors_.push_back(has_tensor(object) ? py::reinterpret_borrow<py::object>(object) : py::object());
  }
}

void ModuleTensors::remember_versions() {
  versions_.reserve(tensors_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const bool counts = tensors_[i] && places_[i].is_parameter;
    versions_.push_back(counts ? version_of(tensor_of(tensors_[i].ptr())) : 0);
  }
}

std::string ModuleTensors::changed() const {
  for (size_t i = 0; i < versions_.size(); ++i) {
    const bool counts = tensors_[i] && places_[i].is_parameter;
    if (counts && version_of(tensor_of(tensors_[i].ptr())) != versions_[i]) return places_[i].name;
  }
  return "";
}

ModuleTensors::Restored::Restored(const ModuleTensors& first) : first_(first) {
  const ModuleTensorPlaces& places = first.places_;
  bool differ = false;
  for (size_t i = 0; i < places.size() && !differ; ++i)
    differ = first.tensors_[i] && present(places[i]) != first.tensors_[i].ptr();
  if (!differ) return;
  for (size_t i = 0; i < places.size(); ++i) {
    PyObject* object = present(places[i]);
    present_.push_back(object == nullptr ? py::object() : py::reinterpret_borrow<py::object>(object));
    if (first.tensors_[i] && has_tensor(object))
      PyDict_SetItem(places[i].owner.ptr(), places[i].leaf.ptr(), first.tensors_[i].ptr());
  }
}

ModuleTensors::Restored::~Restored() {
  if (present_.empty()) return;
  PyObject *type, *value, *traceback;  // an error on its way out must survive
  PyErr_Fetch(&type, &value, &traceback);
  for (size_t i = 0; i < present_.size(); ++i) {
    const ModuleTensorPlace& place = first_.places_[i];
    if (first_.tensors_[i] && has_tensor(present_[i].ptr()))
      PyDict_SetItem(place.owner.ptr(), place.leaf.ptr(), present_[i].ptr());
  }
  PyErr_Restore(type, value, traceback);
}

}  // namespace mlsys::activation
