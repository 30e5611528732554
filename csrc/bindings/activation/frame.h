// The recompute frame of one checkpointed call: what autograd's saved-tensor hooks talk to.
//
// During the forward, pack() replaces every tensor that autograd wants to save by a slot and lets the tensor
// go. The first slot that a backward asks for runs the block again; the tensors saved by that second run are
// stored in the slots by order, and the run is stopped as soon as the last one is there.
//
// Inputs. A frame keeps its input tensors as autograd keeps any saved tensor, so that an enclosing frame, a
// meter or a packing hook sees them. In a chain (frame_chain.h) a frame may instead be linked to the frame
// whose output its input is: then nothing is kept, and the frames before it are run first.
//
// Ownership: autograd nodes own slots, slots own the frame, a linked frame owns the one before it. The frame
// sees its slots weakly: a slot that autograd has dropped receives no tensor. A recomputed tensor leaves its
// slot when it is read, so it dies with the node's backward. Every backward pass (graph task) has its own
// recomputation, which makes retain_graph and double backward work.
//
// Soundness. In the first step what the second run saves is compared with what the first one would have saved
// (comparison.h). A tensor that is changed in place after it was stored is refused when it is read, as
// autograd does without a frame; so is a parameter that changed between the runs (module_tensors.h).
//
// Threading: every entry point runs under the GIL. Tests: tests/activation/test_recompute.py,
// test_soundness.py. Source of the method: the non-reentrant scheme of torch.utils.checkpoint; Griewank &
// Walther 2000 for the idea.
#pragma once

#include <c10/util/SmallVector.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/activation/arguments.h"
#include "bindings/activation/autograd.h"
#include "bindings/activation/comparison.h"
#include "bindings/activation/module_tensors.h"
#include "bindings/activation/run_context.h"
#include "bindings/activation/thread_state.h"

namespace mlsys::activation {

class FrameChain;
struct SlotObject;

// The Python side of the engine, handed over once by mlsys_engine.activation.
struct Hooks {
  pybind11::object open;             // arguments.h
  pybind11::object stop_recompute;   // exception type that ends a recomputation early
  pybind11::object mismatch_error;   // (message) -> exception: the second run differs from the first
  pybind11::object transform_error;  // (block) -> exception: it was called inside torch.func
  pybind11::object checksum;         // comparison.h
};

// What all calls of a part of the model share.
struct Part {
  // Stopping after the last saved tensor takes an exception through torch, some 25 us, so a short rest is run
  // to its end. How long it takes is seen in the first recomputation.
  static constexpr double kWorthStopping_s = 40e-6;
  bool rest_is_known = false;
  double rest_s = 0;
  // Calls that will be compared; none once one was. Finite for parts that run with gradients on and are never
  // run again.
  int num_comparisons_left = 64;
  ModuleTensorPlaces places;

  bool worth_stopping() const { return rest_is_known && rest_s > kWorthStopping_s; }
};

// What is recomputed: `fn`, a part of the model that users know as `name`.
struct Region {
  std::string name;
  pybind11::object fn;
  std::shared_ptr<Part> part;
  std::shared_ptr<Hooks> hooks;
};

// A tensor that is there for a while. The token keeps a memory meter's count alive exactly as long.
struct Stored {
  at::Tensor tensor;
  pybind11::object token;
  uint32_t version = 0;

  bool was_changed() const { return version_of(tensor) != version; }
};

class Frame : public std::enable_shared_from_this<Frame> {
 public:
  // What stays of a recomputation: nothing, the inputs that it was handed, or all that the block saves.
  enum class Keep : uint8_t { kNothing, kInputs, kSaved };

  // `buffers` gives the second run copies of the buffers that the first one writes (enter() and exit()), or
  // is None; `observe` is a memory meter's, or None.
  // Also takes what the region's run depends on, as it is now.
  Frame(Region region, Arguments arguments, pybind11::object buffers, pybind11::object observe);

  // First run. Saves the inputs, except those that `linked` says are outputs of the frame before.
  void keep_inputs(const std::shared_ptr<Frame>& before, const std::vector<int64_t>& linked);
  void join(std::shared_ptr<const FrameChain> chain, size_t position);
  pybind11::object run_first(const pybind11::tuple& positional, const pybind11::dict& keywords);

  // Hooks of the first run and of later ones.
  PyObject* pack(const at::Tensor& tensor);
  void store(const at::Tensor& tensor, bool keeps);
  void forget(size_t slot) { slots_[slot] = nullptr; }
  bool compares() const { return comparison_ != nullptr; }

  // Backward: the tensor of a slot for the running graph task, recomputing the block if nobody has yet.
  at::Tensor unpack(SlotObject& slot);

  std::vector<at::Tensor> tensors_in(const pybind11::object& result) const;
  size_t position() const { return position_; }
  bool has_inputs() const { return before_ == nullptr || !carried_.empty(); }

 private:
  // Runs the frames that the chain lists before this one's backward, and this one.
  void recompute(int64_t task);
  // Runs the block again. With `follower`, hands it the outputs that it is linked to.
  void run_again(Keep keep, int64_t task, Frame* follower);
  void call_again(const std::vector<at::Tensor>& inputs, Keep keep, Frame* follower);
  std::vector<at::Tensor> inputs();
  void carry(const pybind11::object& result, Frame& follower) const;
  Stored held(const at::Tensor& tensor) const;
  void check_same(size_t index, const at::Tensor& tensor);
  void drop_leftovers(int64_t task, int64_t outer_task);
  // Words for the operation behind a saved tensor, as far as it is known.
  std::string origin(size_t index, const at::Tensor& tensor) const;
  [[noreturn]] void raise_changed(const std::string& what, const at::Tensor& tensor) const;
  [[noreturn]] void raise(const std::string& what) const;

  Region region_;
  Arguments arguments_;
  RunContext context_;
  ModuleTensors module_tensors_;
  pybind11::object compiler_;
  pybind11::object buffers_, observe_;
  SavedTensors inputs_;  // nothing where linked
  std::vector<bool> needs_grad_;

  std::shared_ptr<const FrameChain> chain_;
  size_t position_ = 0;
  std::shared_ptr<Frame> before_;
  std::vector<int64_t> linked_;  // for each input: the output of before_ that it is, or -1
  std::vector<Stored> carried_;  // linked inputs, while a recomputation has them

  std::vector<SlotObject*> slots_;
  std::vector<Signature> signatures_;
  std::unique_ptr<Comparison> comparison_;  // in the first step
  int64_t task_ = -1;                       // graph task of the recomputation under way
  size_t next_slot_ = 0;                    // how many tensors it has saved
  std::chrono::steady_clock::time_point last_saved_;
  bool stops_early_ = true;
  bool is_stopped_ = false;
};

// Makes a call through a new frame, as block `position` of the chain, or on its own where `chain` is null.
pybind11::object run(Region region, const std::shared_ptr<FrameChain>& chain, size_t position,
                     const pybind11::tuple& positional, const pybind11::dict& keywords,
                     pybind11::object buffers, pybind11::object observe);

}  // namespace mlsys::activation
