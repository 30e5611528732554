// The recompute frame of one checkpointed call: what autograd's saved-tensor hooks talk to.
//
// During the forward, pack() replaces every tensor that autograd wants to save by a Slot and lets the tensor
// go. The first slot that the backward asks for runs the block again; the tensors saved by that second run
// are stored in the slots by order, and the run is stopped as soon as the last one is there. Tensors are
// opaque Python objects here, so this file needs no torch headers.
//
// Ownership: autograd nodes own slots, slots own the frame, the frame owns the `recompute` callable and,
// through it, the block's inputs. The frame sees its slots weakly: a slot that autograd has dropped receives
// no tensor. A recomputed tensor leaves its slot when it is read, so it dies with the node's backward. Every
// backward pass (graph task) has its own recomputation, which makes retain_graph and double backward work.
//
// Threading: every entry point runs under the GIL. Test: tests/activation/test_recompute.py.
// Source of the method: the non-reentrant scheme of torch.utils.checkpoint; Griewank & Walther 2000 for the
// idea.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/activation/bind.h"

namespace py = pybind11;

namespace mlsys::activation {
namespace {

class Frame;

struct Stored {
  py::object tensor;
  py::object token;  // keeps a memory meter's count alive exactly as long as the tensor
};

struct Slot {
  Slot(std::shared_ptr<Frame> owner, size_t position) : frame(std::move(owner)), index(position) {}
  std::shared_ptr<Frame> frame;
  size_t index;
  std::map<int64_t, Stored> stored;  // graph task -> recomputed tensor
};

// Attributes of a saved tensor that the recomputation must reproduce.
struct Signature {
  py::object shape, dtype, device;

  static Signature of(const py::handle& tensor) {
    return {tensor.attr("shape"), tensor.attr("dtype"), tensor.attr("device")};
  }
  bool equals(const Signature& other) const {
    return dtype.is(other.dtype) && shape.equal(other.shape) && device.equal(other.device);
  }
  std::string text() const {
    return py::str(dtype).cast<std::string>() + py::str(py::tuple(shape)).cast<std::string>() + " on " +
           py::str(device).cast<std::string>();
  }
};

// The Python side of the engine, handed over once by mlsys_engine.activation.
struct Hooks {
  py::object current_graph_task;  // () -> int, -1 outside a backward
  py::object stop_recompute;      // exception type that ends a recomputation early
  py::object mismatch_error;      // (message) -> exception: the second run differs from the first
};

class Frame : public std::enable_shared_from_this<Frame> {
 public:
  Frame(std::string name, py::object recompute, py::object observe, std::shared_ptr<Hooks> hooks)
      : name_(std::move(name)),
        recompute_(std::move(recompute)),
        observe_(std::move(observe)),
        hooks_(std::move(hooks)) {}

  // Forward: forget the tensor, remember its place and what it looked like.
  std::shared_ptr<Slot> pack(const py::object& tensor) {
    auto slot = std::make_shared<Slot>(shared_from_this(), slots_.size());
    slots_.push_back(slot);
    signatures_.push_back(Signature::of(tensor));
    return slot;
  }

  // Backward: the tensor of `slot` for the running graph task, recomputing the block if nobody has yet.
  py::object unpack(Slot& slot) {
    const int64_t task = hooks_->current_graph_task().cast<int64_t>();
    auto found = slot.stored.find(task);
    if (found == slot.stored.end()) {
      const size_t saved_again = run_again(task);
      found = slot.stored.find(task);
      if (found == slot.stored.end()) {
        raise("saved " + std::to_string(slots_.size()) +
              " tensors for the backward in the forward, but only " + std::to_string(saved_again) +
              " when it was run again");
      }
    }
    py::object tensor = std::move(found->second.tensor);
    slot.stored.erase(found);
    return tensor;
  }

  // Recomputation: keep the tensor in the slot of the same order, and stop after the last one.
  py::int_ store(const py::object& tensor) {
    const size_t index = position_++;
    const Signature now = Signature::of(tensor);
    if (index >= slots_.size()) {
      raise("saves more tensors for the backward when it is run again than the " +
            std::to_string(slots_.size()) + " of the forward");
    }
    if (!now.equals(signatures_[index])) {
      raise("saved tensor " + std::to_string(index) + " as " + signatures_[index].text() +
            " in the forward, but as " + now.text() + " when it was run again");
    }
    if (auto slot = slots_[index].lock()) {
      py::object detached = tensor.attr("detach")();
      py::object token =
          observe_.is_none()
              ? py::none()
              : observe_(tensor);  // the original: a detached parameter looks like an activation
      slot->stored.insert_or_assign(task_, Stored{std::move(detached), std::move(token)});
    }
    if (position_ == slots_.size()) {
      PyErr_SetNone(hooks_->stop_recompute.ptr());
      throw py::error_already_set();
    }
    return py::int_(index);
  }

  size_t num_saved() const { return slots_.size(); }

 private:
  // Returns how many tensors the second run saved. Double backward may enter a frame that is being recomputed
  // for another graph task, so the outer run's place is put back afterwards.
  size_t run_again(int64_t task) {
    const int64_t outer_task = std::exchange(task_, task);
    const size_t outer_position = std::exchange(position_, 0);
    const auto put_back = [&] {
      task_ = outer_task;
      return std::exchange(position_, outer_position);
    };
    try {
      recompute_(py::cast(shared_from_this()));
    } catch (...) {
      put_back();
      throw;
    }
    return put_back();
  }

  [[noreturn]] void raise(const std::string& what) const {
    const py::object error = hooks_->mismatch_error("block '" + name_ + "' " + what);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
    throw py::error_already_set();
  }

  std::string name_;
  py::object recompute_;
  py::object observe_;
  std::shared_ptr<Hooks> hooks_;
  std::vector<std::weak_ptr<Slot>> slots_;
  std::vector<Signature> signatures_;
  int64_t task_ = -1;    // graph task of the recomputation under way
  size_t position_ = 0;  // how many tensors it has saved
};

}  // namespace

void bind_frame(py::module_& module) {
  py::class_<Hooks, std::shared_ptr<Hooks>>(module, "Hooks")
      .def(py::init([](py::object current_graph_task, py::object stop_recompute, py::object mismatch_error) {
             return std::make_shared<Hooks>(
                 Hooks{std::move(current_graph_task), std::move(stop_recompute), std::move(mismatch_error)});
           }),
           py::arg("current_graph_task"), py::arg("stop_recompute"), py::arg("mismatch_error"));
  py::class_<Slot, std::shared_ptr<Slot>>(module, "Slot");
  py::class_<Frame, std::shared_ptr<Frame>>(module, "Frame")
      .def(py::init<std::string, py::object, py::object, std::shared_ptr<Hooks>>(), py::arg("name"),
           py::arg("recompute"), py::arg("observe"), py::arg("hooks"))
      .def("pack", &Frame::pack)
      .def("store", &Frame::store)
      .def_property_readonly("num_saved", &Frame::num_saved);
  module.def("unpack", [](Slot& slot) {
    const std::shared_ptr<Frame> frame = slot.frame;  // stays alive while it recomputes
    return frame->unpack(slot);
  });
}

}  // namespace mlsys::activation
