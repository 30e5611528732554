// Hands the tensors of an accelerator to the backend that serves it: CUDA's to NCCL.
//
// That backend is made by a Python function, so our C++ needs no NCCL headers, and not before the first such
// tensor comes, because making it starts threads. When the group fails, the backend is aborted, so that
// waits on the device end like those on the host.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceType.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <vector>

namespace mlsys::binding {

// A faster way than the backend's for all-reduces of small tensors.
class SmallAllReduce {
 public:
  virtual ~SmallAllReduce() = default;
  // Null for a call that it does not take, on all ranks alike.
  virtual c10::intrusive_ptr<c10d::Work> all_reduce(std::vector<at::Tensor>& tensors,
                                                    const c10d::AllreduceOptions& options) = 0;
  // Ends waits on the device. From any thread.
  virtual void stop() = 0;
  // Why a wait on the device was given up, in words; empty when none was.
  virtual std::string failure() const = 0;
};

class Accelerator {
 public:
  using BackendPtr = c10::intrusive_ptr<c10d::Backend>;
  using Maker = std::function<BackendPtr()>;
  using SmallPtr = std::shared_ptr<SmallAllReduce>;
  // Called on all ranks, in the first collective on tensors of the accelerator. May return null.
  using SmallMaker = std::function<SmallPtr(int device, int num_hosts, BackendPtr backend)>;

  // A null `maker`: there is no backend, and nothing is ever forwarded.
  Accelerator(c10::DeviceType device_type, Maker maker, SmallMaker small_maker)
      : device_type_(device_type),
        available_(maker != nullptr),
        maker_(std::move(maker)),
        small_maker_(std::move(small_maker)) {}
  Accelerator(const Accelerator&) = delete;
  Accelerator& operator=(const Accelerator&) = delete;
  ~Accelerator() { close(false); }

  c10::DeviceType device_type() const { return device_type_; }
  bool available() const { return available_; }
  // Null before the first call of backend().
  c10d::Backend* made() const { return made_.load(std::memory_order_acquire); }
  // Makes the backend at the first call; `prepare` is then called with it. Releases the GIL while it waits.
  c10d::Backend& backend(const std::function<void(c10d::Backend&)>& prepare);

  // Sets up the way for small tensors, at the first call.
  void prepare_small(int device, int num_hosts);
  // Null when there is none.
  SmallPtr small() const { return std::atomic_load(&small_); }

  // Aborts the backend on a thread of its own, because an abort may wait for the device. Idempotent.
  void abort_soon();
  // Ends the backend, by its shutdown() when `orderly`, and lets go of the maker. Idempotent. The caller does
  // not hold the GIL.
  void close(bool orderly);

 private:
  const c10::DeviceType device_type_;
  const bool available_;
  std::mutex mutex_;
  Maker maker_;
  SmallMaker small_maker_;
  SmallPtr small_;
  BackendPtr backend_;
  std::atomic<c10d::Backend*> made_{nullptr};
  std::thread aborting_;
  bool aborted_ = false;
  bool closed_ = false;
};

// On which devices the tensors of one call are.
struct DeviceCount {
  c10::DeviceType accelerator;
  size_t on_accelerator = 0;
  size_t elsewhere = 0;
  int index = -1;  // of a device of the accelerator among them

  void look(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    const c10::Device device = tensor.device();
    ++(device.type() == accelerator ? on_accelerator : elsewhere);
    if (device.type() == accelerator) index = device.index();
  }
  template <class Item>
  void look(const std::vector<Item>& items) {
    for (const auto& item : items) look(item);
  }
};

}  // namespace mlsys::binding
