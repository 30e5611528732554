#include "bindings/activation/frame.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>

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

[[noreturn]] void throw_error(const py::object& error) {
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw py::error_already_set();
}

}  // namespace

Frame::Frame(Region region, Arguments arguments, py::object buffers, py::object observe)
    : region_(std::move(region)),
      arguments_(std::move(arguments)),
      context_(arguments_.tensors()),
      module_tensors_(region_.part->places),
      compiler_(compiler_now()),
      buffers_(std::move(buffers)),
      observe_(std::move(observe)) {
  if (region_.part->num_comparisons_left == 0) return;
  --region_.part->num_comparisons_left;
  comparison_ = std::make_unique<Comparison>(region_.hooks->checksum);
}

void Frame::join(std::shared_ptr<const FrameChain> chain, size_t position) {
  chain_ = std::move(chain);
  position_ = position;
}

void Frame::keep_inputs(const std::shared_ptr<Frame>& before, const std::vector<int64_t>& linked) {
  before_ = before;
  linked_ = linked;
  const std::vector<at::Tensor>& tensors = arguments_.tensors();
  const SavingInputs saving(region_.name);
  for (size_t i = 0; i < tensors.size(); ++i) {
    needs_grad_.push_back(tensors[i].requires_grad());
    const bool is_linked = before_ && linked_[i] >= 0;
    if (comparison_) comparison_->add_input(is_linked ? &tensors[i] : nullptr);
    if (is_linked) {
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
    const CompilerSet compiler(compiler_);
    const SavedTensorHooks hooks(shared_from_this(), HookKind::kPack);
    result = called(region_.fn, positional, keywords);
  }
  if (!result) throw py::error_already_set();
  context_.forget_unused();
  module_tensors_.remember_versions();
  if (comparison_) comparison_->name_savers(tensors_in(result));
  return result;
}

PyObject* Frame::pack(const at::Tensor& tensor) {
  PyObject* slot = make_slot(shared_from_this(), slots_.size());
  slots_.push_back(reinterpret_cast<SlotObject*>(slot));
  signatures_.push_back(Signature::of(tensor));
  if (comparison_) comparison_->add(tensor);
  return slot;
}

void Frame::store(const at::Tensor& tensor, bool keeps) {
  if (!is_stopped_) {
    const size_t index = next_slot_++;
    check_same(index, tensor);
    if (!keeps) return;
    if (SlotObject* slot = slots_[index]) slot->stored.emplace_back(task_, held(tensor));
    if (next_slot_ < slots_.size()) return;
    last_saved_ = std::chrono::steady_clock::now();
    if (!stops_early_) return;
    is_stopped_ = true;  // and stays so where the block catches what it should not
  }
  PyErr_SetNone(region_.hooks->stop_recompute.ptr());
  throw py::error_already_set();
}

void Frame::check_same(size_t index, const at::Tensor& tensor) {
  if (index >= slots_.size()) {
    const std::string giver = giver_of(tensor);
    raise("saves more tensors for the backward when it is run again than the " +
          std::to_string(slots_.size()) + " of the forward" +
          (giver.empty() ? "" : "; the first of them is " + given_by(giver)));
  }
  const std::string which = "saved tensor " + std::to_string(index);
  const Signature now = Signature::of(tensor);
  if (now != signatures_[index]) {
    raise(which + origin(index, tensor) + " as " + signatures_[index].text() + " in the forward, but as " +
          now.text() + " when it was run again");
  }
  if (!comparison_) return;
  if (!comparison_->equals(index, tensor)) {
    raise(which + origin(index, tensor) + " with other values when it was run again (" + now.text() + ")");
  }
  if (comparison_->is_done()) region_.part->num_comparisons_left = 0;
}

std::string Frame::origin(size_t index, const at::Tensor& tensor) const {
  const std::string known = comparison_ ? comparison_->origin(index) : given_by(giver_of(tensor));
  return known.empty() ? "" : " (" + known + ")";
}

Stored Frame::held(const at::Tensor& tensor) const {
  // The meter is shown the original: a detached parameter looks like an activation.
  py::object token = py::none();
  if (!observe_.is_none()) token = observe_(py::reinterpret_steal<py::object>(object_of(tensor)));
  return {tensor.detach(), std::move(token), version_of(tensor)};
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
            " when it was run again" +
            (comparison_ ? "; the first that is missing is " + comparison_->origin(slot.index) : ""));
    }
  }
  const Stored stored = std::move(found->second);
  slot.stored.erase(found);
  if (stored.was_changed()) raise_changed("a tensor that the backward needs", stored.tensor);
  return stored.tensor;
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
  if (const std::string name = module_tensors_.changed(); !name.empty()) {
    raise("has a parameter '" + name + "' that was changed in place between the forward and the backward");
  }
  if (region_.part->num_comparisons_left == 0) comparison_.reset();
  const std::vector<at::Tensor> values = inputs();
  if (keep == Keep::kSaved) drop_leftovers(task, task_);
  if (keep != Keep::kInputs) carried_.clear();
  // A double backward may enter a frame that is being recomputed for another graph task: the outer run's
  // place is put back afterwards.
  const int64_t outer_task = std::exchange(task_, task);
  const size_t outer_slot = std::exchange(next_slot_, 0);
  const bool outer_stop = std::exchange(stops_early_, follower == nullptr && region_.part->worth_stopping());
  const bool outer_stopped = std::exchange(is_stopped_, false);
  const auto put_back = [&] {
    task_ = outer_task;
    next_slot_ = outer_slot;
    stops_early_ = outer_stop;
    is_stopped_ = outer_stopped;
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
    const TransformsSuspended transforms;
    const CompilerSet compiler(compiler_);
    const ModuleTensors::Restored module_tensors(module_tensors_);
    const BuffersReplaced buffers(buffers_);
    const SavedTensorHooks hooks(shared_from_this(),
                                 keep == Keep::kSaved ? HookKind::kStore : HookKind::kDrop);
    result = called(region_.fn, positional, keywords);
  }
  if (result && keep == Keep::kSaved && !region_.part->rest_is_known && next_slot_ == slots_.size()) {
    const std::chrono::duration<double> rest = std::chrono::steady_clock::now() - last_saved_;
    region_.part->rest_is_known = true;
    region_.part->rest_s = rest.count();
  }
  if (!result) {
    if (!PyErr_ExceptionMatches(region_.hooks->stop_recompute.ptr())) throw py::error_already_set();
    PyErr_Clear();
  } else if (follower != nullptr) {
    carry(result, *follower);
  }
}

// Of backwards that did not read them, as one that ended in an error or needed a part of the graph alone. A
// backward that is still under way, around this one, would run the block again.
void Frame::drop_leftovers(int64_t task, int64_t outer_task) {
  for (SlotObject* slot : slots_) {
    if (slot == nullptr || slot->stored.empty()) continue;
    std::erase_if(slot->stored, [&](const std::pair<int64_t, Stored>& stored) {
      return stored.first != task && stored.first != outer_task;
    });
  }
}

std::vector<at::Tensor> Frame::inputs() {
  std::vector<at::Tensor> values;
  values.reserve(inputs_.size());
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const bool is_carried = before_ && linked_[i] >= 0;
    if (is_carried && carried_[i].was_changed()) raise_changed("an input", carried_[i].tensor);
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
    const bool compares = follower.compares() && follower.region_.part->num_comparisons_left > 0;
    if (compares && !follower.comparison_->equals_input(i, outputs[output])) {
      const std::string giver = giver_of(outputs[output]);
      raise("returned other values when it was run again" + (giver.empty() ? "" : ", " + given_by(giver)));
    }
    follower.carried_[i] = held(outputs[output]);
  }
}

std::vector<at::Tensor> Frame::tensors_in(const py::object& result) const {
  return Arguments(py::make_tuple(result), py::dict(), region_.hooks->open).tensors();
}

void Frame::raise_changed(const std::string& what, const at::Tensor& tensor) const {
  raise("changed " + what + " in place (" + Signature::of(tensor).text() + ")");
}

void Frame::raise(const std::string& what) const {
  throw_error(region_.hooks->mismatch_error("block '" + region_.name + "' " + what));
}

py::object run(Region region, const std::shared_ptr<FrameChain>& chain, size_t position,
               const py::tuple& positional, const py::dict& keywords, py::object buffers,
               py::object observe) {
  if (is_transformed()) throw_error(region.hooks->transform_error(region.name));
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
