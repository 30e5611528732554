// The process group's way to the accelerator's backend, and what concerns both backends.
#include <algorithm>
#include <utility>

#include "bindings/comm/failures.h"
#include "bindings/comm/process_group.h"
#include "bindings/comm/work.h"

namespace mlsys::binding {

using std::chrono::milliseconds;
using WorkPtr = ProcessGroupMlsys::WorkPtr;

namespace {

bool is_message(c10d::OpType type) {
  return type == c10d::OpType::SEND || type == c10d::OpType::RECV || type == c10d::OpType::RECVANYSOURCE;
}

}  // namespace

c10d::Backend& ProcessGroupMlsys::accelerator_backend() {
  Accelerator& accelerator = membership_->accelerator();
  return accelerator.backend([this, &accelerator](c10d::Backend& made) {
    made.setGroupUid(getGroupUid());
    made.setGroupDesc(getGroupDesc());
    if (getBoundDeviceId()) made.setBoundDeviceId(getBoundDeviceId());
    if (timeout_ms_ != membership_->options().timeout.count()) made.setTimeout(milliseconds(timeout_ms_));
    membership_->communicator().on_failure([&accelerator] { accelerator.abort_soon(); });
  });
}

c10d::Backend* ProcessGroupMlsys::forward(const Call& call, const DeviceCount& devices) {
  if (!membership_->accelerator().available()) return nullptr;  // refused by the checks of CPU tensors
  if (devices.elsewhere > 0) {
    throw Refused(
        where(call.name) + " was given tensors on several devices: " +
            std::to_string(devices.on_accelerator) + " on " + c10::DeviceTypeName(devices.accelerator, true) +
            " and " + std::to_string(devices.elsewhere) + " elsewhere.",
        "The tensors of one call are all on one kind of device.", "Move them with .to(device) first.");
  }
  auto& backend = accelerator_backend();
  try {
    if (const auto small = membership_->accelerator().small()) {
      if (const auto failure = small->failure(); !failure.empty()) {
        membership_->communicator().poison(failure);
      }
    }
    membership_->communicator().expect_healthy();
  } catch (...) {
    std::rethrow_exception(
        for_python(std::current_exception(), Place{call.name, issued_, where(call.name).words()}));
  }
  // In a message not all ranks take part.
  if (getSize() > 1 && devices.index >= 0 && !is_message(call.type)) {
    membership_->accelerator().prepare_small(devices.index, membership_->communicator().num_hosts());
  }
  if (coalescing_ == std::this_thread::get_id() && !std::exchange(batch_.on_accelerator, true)) {
    backend.startCoalescing();
  }
  return &backend;
}

WorkPtr ProcessGroupMlsys::small_all_reduce(std::vector<at::Tensor>& tensors,
                                            const c10d::AllreduceOptions& options) {
  const auto small = membership_->accelerator().small();
  // What is coalesced goes to the backend as a whole, since it is waited for as a whole.
  if (!small || coalescing_ == std::this_thread::get_id()) return nullptr;
  return small->all_reduce(tensors, options);
}

c10d::Backend* ProcessGroupMlsys::elsewhere_for_barrier(const Call& call,
                                                        const c10d::BarrierOptions& options) {
  const auto type = membership_->accelerator().device_type();
  const auto is_its = [type](const std::optional<at::Device>& device) {
    return device && device->type() == type;
  };
  const bool named =
      options.device ? is_its(options.device) : !options.device_ids.empty() || is_its(getBoundDeviceId());
  return named ? forward(call, DeviceCount{type, 1, 0}) : nullptr;
}

void ProcessGroupMlsys::startCoalescing() {
  if (!supportsCoalescing()) return c10d::Backend::startCoalescing();  // which refuses
  batch_ = {};
  coalescing_ = std::this_thread::get_id();
}

WorkPtr ProcessGroupMlsys::endCoalescing() {
  if (!supportsCoalescing()) return c10d::Backend::endCoalescing();
  coalescing_ = std::thread::id{};
  auto works = std::exchange(batch_.works, {});
  if (std::exchange(batch_.on_accelerator, false)) {
    works.push_back(accelerator_backend().endCoalescing());
  }
  if (works.size() == 1) return works[0];
  return c10::make_intrusive<JoinedWork>(getRank(), std::move(works));
}

WorkPtr ProcessGroupMlsys::keep(WorkPtr work) {
  if (coalescing_.load(std::memory_order_relaxed) == std::this_thread::get_id()) batch_.works.push_back(work);
  return work;
}

std::shared_ptr<c10::Allocator> ProcessGroupMlsys::getMemAllocator() {
  if (!membership_->accelerator().available()) return c10d::Backend::getMemAllocator();
  return accelerator_backend().getMemAllocator();
}

c10d::ErrorType ProcessGroupMlsys::getError() {
  auto* made = membership_->accelerator().made();
  return made != nullptr ? made->getError() : c10d::ErrorType::SUCCESS;
}

void ProcessGroupMlsys::setGroupUid(const std::string& group_uid) {
  c10d::Backend::setGroupUid(group_uid);
  if (auto* made = membership_->accelerator().made()) made->setGroupUid(group_uid);
}

void ProcessGroupMlsys::setTimeout(milliseconds timeout) {
  timeout_ms_ = timeout.count();
  if (auto* made = membership_->accelerator().made()) made->setTimeout(timeout);
}

uint64_t ProcessGroupMlsys::getSequenceNumberForGroup() {
  auto* made = membership_->accelerator().made();
  return issued_ + (made != nullptr ? made->getSequenceNumberForGroup() : 0);
}

}  // namespace mlsys::binding
