#include "bindings/comm/accelerator.h"

#include <stdexcept>

#include "bindings/comm/gil.h"

namespace mlsys::binding {

c10d::Backend& Accelerator::backend(const std::function<void(c10d::Backend&)>& prepare) {
  if (auto* ready = made()) return *ready;
  const WithoutGil released;  // the maker takes it, maybe on another thread that holds the mutex
  const std::lock_guard lock(mutex_);
  if (closed_) throw std::runtime_error("the process group was shut down");
  if (!backend_) {
    backend_ = maker_();
    prepare(*backend_);
    made_.store(backend_.get(), std::memory_order_release);
  }
  return *backend_;
}

void Accelerator::prepare_small(int device, int num_hosts) {
  SmallMaker make;
  BackendPtr backend;
  {
    const WithoutGil released;
    const std::lock_guard lock(mutex_);
    make.swap(small_maker_);
    backend = backend_;
  }
  if (make && backend) std::atomic_store(&small_, make(device, num_hosts, backend));
}

void Accelerator::abort_soon() {
  if (const auto ready = small()) ready->stop();
  const std::lock_guard lock(mutex_);
  if (aborted_ || closed_ || !backend_) return;
  aborted_ = true;
  aborting_ = std::thread([backend = backend_] {
    try {
      backend->abort();
    } catch (const std::exception& e) {
      TORCH_WARN("mlsys: the abort of backend ", backend->getBackendName(), " failed: ", e.what());
    }
  });
}

void Accelerator::close(bool orderly) {
  Maker dropped;
  SmallMaker dropped_too;
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return;
    closed_ = true;
    dropped.swap(maker_);
    dropped_too.swap(small_maker_);
  }
  if (const auto ready = small(); ready && !orderly) ready->stop();
  if (aborting_.joinable()) aborting_.join();
  if (!backend_ || aborted_) return;
  if (orderly) {
    backend_->shutdown();
  } else {
    backend_->abort();
  }
}

}  // namespace mlsys::binding
