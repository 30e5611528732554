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
#include <mutex>
#include <thread>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <vector>

namespace mlsys::binding {

class Accelerator {
 public:
  using BackendPtr = c10::intrusive_ptr<c10d::Backend>;
  using Maker = std::function<BackendPtr()>;

  // A null `maker`: there is no backend, and nothing is ever forwarded.
  Accelerator(c10::DeviceType device_type, Maker maker)
      : device_type_(device_type), available_(maker != nullptr), maker_(std::move(maker)) {}
  Accelerator(const Accelerator&) = delete;
  Accelerator& operator=(const Accelerator&) = delete;
  ~Accelerator() { close(false); }

  c10::DeviceType device_type() const { return device_type_; }
  bool available() const { return available_; }
  // Null before the first call of backend().
  c10d::Backend* made() const { return made_.load(std::memory_order_acquire); }
  // Makes the backend at the first call; `prepare` is then called with it. Releases the GIL while it waits.
  c10d::Backend& backend(const std::function<void(c10d::Backend&)>& prepare);

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

  void look(const at::Tensor& tensor) {
    if (tensor.defined()) ++(tensor.device().type() == accelerator ? on_accelerator : elsewhere);
  }
  template <class Item>
  void look(const std::vector<Item>& items) {
    for (const auto& item : items) look(item);
  }
};

}  // namespace mlsys::binding
