#include "bindings/activation/frame.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <sstream>

#include "bindings/activation/frame_chain.h"
#include "bindings/activation/hooks.h"

namespace py = pybind11;

namespace mlsys::activation {

namespace {

// Keeps copies of buffers in the place of the buffers while it lives.
class BuffersReplaced {
 public:
  explicit BuffersReplaced(const py::object& buffers) : buffers_(buffers) {
    if (!buffers_.is_none()) buffers_.attr("enter")();
  }
  ~BuffersReplaced() {
    if (buffers_.is_none()) return;
    PyObject *type, *value, *traceback;  // an error on its way out must survive the call
    PyErr_Fetch(&type, &value, &traceback);
    const py::object done =
        py::reinterpret_steal<py::object>(PyObject_CallMethod(buffers_.ptr(), "exit", nullptr));
    if (!done) PyErr_WriteUnraisable(buffers_.ptr());
    PyErr_Restore(type, value, traceback);
  }

 private:
  const py::object& buffers_;
};

py::object called(const py::object& fn, const py::tuple& positional, const py::dict& keywords) {
  PyObject* result = PyObject_Call(fn.ptr(), positional.ptr(), keywords.ptr());
  return py::reinterpret_steal<py::object>(result);  // null when it raised
}

}  // namespace

Signature Signature::of(const at::Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {{sizes.begin(), sizes.end()}, tensor.scalar_type(), tensor.device()};
}

std::string Signature::text() const {
  py::tuple shape(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) shape[i] = sizes[i];
  std::ostringstream text;
  text << name_of(dtype) << py::str(shape).cast<std::string>() << " on " << device;
  return text.str();
}

Frame::Frame(Region region, Arguments arguments, py::object buffers, py::object observe)
    : region_(std::move(region)),
      arguments_(std::move(arguments)),
      context_(arguments_.tensors()),
      buffers_(std::move(buffers)),
      observe_(std::move(observe)) {}

void Frame::join(std::shared_ptr<const FrameChain> chain, size_t position) {
  chain_ = std::move(chain);
  position_ = position;
}

void Frame::keep_inputs(const std::shared_ptr<Frame>& before, const std::vector<int64_t>& linked) {
  before_ = before;
  linked_ = linked;
  const std::vector<at::Tensor>& tensors = arguments_.tensors();
  for (size_t i = 0; i < tensors.size(); ++i) {
    needs_grad_.push_back(tensors[i].requires_grad());
    if (before_ && linked_[i] >= 0) {
      inputs_.add_nothing();
    } else {
      inputs_.add(tensors[i]);
    }
  }
  arguments_.release_tensors();
}

py::object Frame::run_first(const py::tuple& positional, const py::dict& keywords) {
  py::object result;
  {
    const SavedTensorHooks hooks(shared_from_this(), HookKind::kPack);
    result = called(region_.fn, positional, keywords);
  }
  if (!result) throw py::error_already_set();
  context_.forget_unused();
  return result;
}

PyObject* Frame::pack(const at::Tensor& tensor) {
  PyObject* slot = make_slot(shared_from_this(), slots_.size());
  slots_.push_back(reinterpret_cast<SlotObject*>(slot));
  signatures_.push_back(Signature::of(tensor));
  return slot;
}

void Frame::store(const at::Tensor& tensor) {
  const size_t index = next_slot_++;
  if (index >= slots_.size()) {
    raise("saves more tensors for the backward when it is run again than the " +
          std::to_string(slots_.size()) + " of the forward");
  }
  const Signature now = Signature::of(tensor);
  if (now != signatures_[index]) {
    raise("saved tensor " + std::to_string(index) + " as " + signatures_[index].text() +
          " in the forward, but as " + now.text() + " when it was run again");
  }
  if (SlotObject* slot = slots_[index]) slot->stored.emplace_back(task_, held(tensor));
  if (next_slot_ < slots_.size()) return;
  last_saved_ = std::chrono::steady_clock::now();
  if (stops_early_) {
    PyErr_SetNone(region_.hooks->stop_recompute.ptr());
    throw py::error_already_set();
  }
}

Stored Frame::held(const at::Tensor& tensor) const {
  // The meter is shown the original: a detached parameter looks like an activation.
  py::object token = py::none();
  if (!observe_.is_none()) token = observe_(py::reinterpret_steal<py::object>(object_of(tensor)));
  return {tensor.detach(), std::move(token)};
}

at::Tensor Frame::unpack(SlotObject& slot) {
  const int64_t task = current_graph_task();
  const auto of_task = [task](const std::pair<int64_t, Stored>& stored) { return stored.first == task; };
  auto found = std::find_if(slot.stored.begin(), slot.stored.end(), of_task);
  if (found == slot.stored.end()) {
    recompute(task);
    found = std::find_if(slot.stored.begin(), slot.stored.end(), of_task);
    if (found == slot.stored.end()) {
      raise("saved " + std::to_string(slots_.size()) +
            " tensors for the backward in the forward, but fewer than " + std::to_string(slot.index + 1) +
            " when it was run again");
    }
  }
  at::Tensor tensor = std::move(found->second.tensor);
  slot.stored.erase(found);
  return tensor;
}

void Frame::recompute(int64_t task) {
  std::vector<std::pair<std::shared_ptr<Frame>, Keep>> runs;  // backwards, from this frame
  runs.emplace_back(shared_from_this(), Keep::kSaved);
  if (chain_) {
    const std::vector<FrameChainStep>& steps = chain_->before(position_);
    for (auto step = steps.rbegin() + 1; step != steps.rend() && runs.back().first->before_; ++step) {
      runs.emplace_back(runs.back().first->before_, step->keep);
    }
    // The schedule expects inputs that a second backward through the same graph does not find any more.
    while (!runs.back().first->has_inputs()) {
      runs.emplace_back(runs.back().first->before_, Keep::kNothing);
    }
  }
  for (auto run = runs.rbegin(); run != runs.rend(); ++run) {
    const bool is_last = run + 1 == runs.rend();
    run->first->run_again(run->second, task, is_last ? nullptr : (run + 1)->first.get());
  }
}

void Frame::run_again(Keep keep, int64_t task, Frame* follower) {
  const std::vector<at::Tensor> values = inputs();
  if (keep != Keep::kInputs) carried_.clear();
  // A double backward may enter a frame that is being recomputed for another graph task: the outer run's
  // place is put back afterwards.
  const int64_t outer_task = std::exchange(task_, task);
  const size_t outer_slot = std::exchange(next_slot_, 0);
  const bool outer_stop = std::exchange(stops_early_, follower == nullptr && region_.rest->worth_stopping());
  const auto put_back = [&] {
    task_ = outer_task;
    next_slot_ = outer_slot;
    stops_early_ = outer_stop;
  };
  try {
    call_again(values, keep, follower);
  } catch (...) {
    put_back();
    throw;
  }
  put_back();
}

void Frame::call_again(const std::vector<at::Tensor>& inputs, Keep keep, Frame* follower) {
  const py::tuple positional = arguments_.positional(inputs);
  const py::dict keywords = arguments_.keywords(inputs);
  py::object result;
  {
    const RunContext::Restored context(context_);
    const at::AutoGradMode with_grad(true);
    const BuffersReplaced buffers(buffers_);
    const SavedTensorHooks hooks(shared_from_this(),
                                 keep == Keep::kSaved ? HookKind::kStore : HookKind::kDrop);
    result = called(region_.fn, positional, keywords);
  }
  if (result && keep == Keep::kSaved && !region_.rest->seen && next_slot_ == slots_.size()) {
    const std::chrono::duration<double> rest = std::chrono::steady_clock::now() - last_saved_;
    *region_.rest = {true, rest.count()};
  }
  if (!result) {
    if (!PyErr_ExceptionMatches(region_.hooks->stop_recompute.ptr())) throw py::error_already_set();
    PyErr_Clear();
  } else if (follower != nullptr) {
    carry(result, *follower);
  }
}

std::vector<at::Tensor> Frame::inputs() {
  std::vector<at::Tensor> values;
  values.reserve(inputs_.size());
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const bool is_carried = before_ && linked_[i] >= 0;
    const at::Tensor value = is_carried ? carried_[i].tensor : inputs_.read(i);
    values.push_back(value.detach().set_requires_grad(needs_grad_[i]));
  }
  return values;
}

void Frame::carry(const py::object& result, Frame& follower) const {
  const std::vector<at::Tensor> outputs = tensors_in(result);
  follower.carried_.clear();
  follower.carried_.resize(follower.linked_.size());
  for (size_t i = 0; i < follower.linked_.size(); ++i) {
    const int64_t output = follower.linked_[i];
    if (output < 0) continue;
    if (output >= static_cast<int64_t>(outputs.size())) raise("returned fewer tensors when it was run again");
    follower.carried_[i] = held(outputs[output]);
  }
}

std::vector<at::Tensor> Frame::tensors_in(const py::object& result) const {
  return Arguments(py::make_tuple(result), py::dict(), region_.hooks->open).tensors();
}

void Frame::raise(const std::string& what) const {
  const py::object error = region_.hooks->mismatch_error("block '" + region_.name + "' " + what);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw py::error_already_set();
}

py::object run(Region region, const std::shared_ptr<FrameChain>& chain, size_t position,
               const py::tuple& positional, const py::dict& keywords, py::object buffers,
               py::object observe) {
  Arguments arguments(positional, keywords, region.hooks->open);
  const std::vector<at::Tensor> inputs = arguments.tensors();
  const bool opened = arguments.opened();
  py::tuple given = opened ? arguments.positional(inputs) : positional;
  py::dict named = opened ? arguments.keywords(inputs) : keywords;
  auto frame = std::make_shared<Frame>(std::move(region), std::move(arguments), std::move(buffers),
                                       std::move(observe));
  std::shared_ptr<Frame> before;
  std::vector<int64_t> linked;
  if (chain) {
    frame->join(chain, position);
    if (chain->linked(position)) before = chain->find_before(position, inputs, linked);
  }
  frame->keep_inputs(before, linked);
  py::object result = frame->run_first(given, named);
  if (chain && chain->linked(position + 1)) chain->remember(frame, frame->tensors_in(result));
  return result;
}

}  // namespace mlsys::activation
