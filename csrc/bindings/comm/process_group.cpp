#include "bindings/comm/process_group.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/util/ParallelGuard.h>

#include <optional>
#include <utility>

#include "bindings/comm/failures.h"
#include "bindings/comm/gil.h"
#include "bindings/comm/tensors.h"
#include "bindings/comm/work.h"

namespace mlsys::binding {
namespace {

using std::chrono::milliseconds;

// A copy in a body must not open a second OpenMP pool on the worker's thread, nor record gradients.
struct SerialNoGrad {
  at::NoGradGuard no_grad;
  c10::ParallelGuard serial{true};
};

void check_contiguous(const at::Tensor& tensor, const Where& where) {
  if (tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg()) return;
  throw Refused(where + " was given a tensor that is not contiguous.",
                "Tensors must be contiguous to be sent or received.", "Call .contiguous() first.");
}

}  // namespace

ProcessGroupMlsys::ProcessGroupMlsys(std::shared_ptr<Membership> membership)
    : c10d::Backend(membership->options().rank, membership->options().size),
      membership_(std::move(membership)),
      timeout_ms_(membership_->options().timeout.count()) {
  const comm::Options& options = membership_->options();
  recorded_ = std::make_shared<comm::RecordedGroup>(
      comm::RecordedGroup{options.group_name, options.global_ranks, options.rank});
  comm::Recorder::of_process().add_group(recorded_);
  init();
}

ProcessGroupMlsys::~ProcessGroupMlsys() {
  const WithoutGil released;  // leaving joins threads that may need the GIL to drop a tensor
  membership_->leave(milliseconds(0));
  membership_.reset();
}

void ProcessGroupMlsys::connect() {
  try {
    membership_->executor().run([&] { membership_->communicator().connect(milliseconds(timeout_ms_)); });
  } catch (...) {
    const Place place{"connecting", 0, where("connecting").words()};
    std::rethrow_exception(for_python(std::current_exception(), place));
  }
}

void ProcessGroupMlsys::expect_present(const std::vector<int>& global_ranks) {
  try {
    membership_->communicator().expect_present(global_ranks);
  } catch (...) {
    const Place place{"connecting", 0, where("connecting").words()};
    std::rethrow_exception(for_python(std::current_exception(), place));
  }
}

void ProcessGroupMlsys::shutdown() {
  const WithoutGil released;  // leaving joins threads that may need the GIL to drop a tensor
  membership_->leave(milliseconds(1000));
}

void ProcessGroupMlsys::abort() {
  const WithoutGil released;  // leaving joins threads that may need the GIL to drop a tensor
  membership_->leave(milliseconds(0));
}

int ProcessGroupMlsys::checked_root(int64_t root, const Where& where) const {
  if (root >= 0 && root < getSize()) return static_cast<int>(root);
  throw Refused(where + " was given root " + std::to_string(root) + ".",
                "The group has ranks 0 to " + std::to_string(getSize() - 1) + ".", "Name one of them.");
}

ProcessGroupMlsys::WorkPtr ProcessGroupMlsys::start(const Call& call, const std::vector<at::Tensor>& inputs,
                                                    std::vector<at::Tensor> outputs, milliseconds timeout,
                                                    bool async, Body body) {
  const uint64_t sequence = ++issued_;
  const milliseconds limit = timeout > milliseconds(0) ? timeout : milliseconds(timeout_ms_);
  Record record(recorded_, {call.type, call.name, sequence, limit}, inputs, outputs);
  auto work = c10::make_intrusive<CollectiveWork>(getRank(), call.type, call.profile_title, inputs,
                                                  std::move(outputs),
                                                  Place{call.name, sequence, where(call.name).words()});
  // The task keeps the group's membership by a plain reference: the membership outlives its executor's tasks.
  membership_->executor().submit(
      [work, limit, record = std::move(record), body = std::move(body),
       &membership = *membership_](std::exception_ptr refusal) {
        std::exception_ptr failure = refusal;
        if (!refusal) {
          record.started();
          try {
            const SerialNoGrad guard;
            body(membership.communicator(), limit);
          } catch (...) {
            failure = std::current_exception();
          }
        }
        work->complete(membership.told(failure, work->place(), record));
      },
      !async);
  return work;
}

ProcessGroupMlsys::WorkPtr ProcessGroupMlsys::send(std::vector<at::Tensor>& tensors, int destination,
                                                   int tag) {
  constexpr Call kCall{c10d::OpType::SEND, "send", "mlsys:send"};
  if (auto* backend = elsewhere(kCall, tensors)) return backend->send(tensors, destination, tag);
  const auto here = where(kCall.name);
  const auto& tensor = the_one(tensors, here);
  check_contiguous(tensor, here);
  const size_t bytes = tensor.numel() * tensor.element_size();
  const int peer = checked_root(destination, here);
  const Place place{kCall.name, ++messages_, here.words()};
  const milliseconds timeout(timeout_ms_);
  Record record(recorded_, {kCall.type, kCall.name, place.sequence, timeout, getRank(), peer}, tensor, {});
  auto request = membership_->communicator().send(tensor.const_data_ptr(), bytes, peer, tag);
  return keep(c10::make_intrusive<PointToPointWork>(getRank(), kCall.type, kCall.profile_title, tensor, place,
                                                    timeout, std::move(request), std::move(record)));
}

ProcessGroupMlsys::WorkPtr ProcessGroupMlsys::receive(const Call& call, std::vector<at::Tensor>& tensors,
                                                      int source, int tag) {
  const auto here = where(call.name);
  const auto& tensor = the_one(tensors, here);
  check_contiguous(tensor, here);
  const size_t bytes = tensor.numel() * tensor.element_size();
  const Place place{call.name, ++messages_, here.words()};
  const milliseconds timeout(timeout_ms_);
  Record record(recorded_, {call.type, call.name, place.sequence, timeout, source, getRank()}, {}, tensor);
  auto request = membership_->communicator().recv(tensor.mutable_data_ptr(), bytes, source, tag);
  return keep(c10::make_intrusive<PointToPointWork>(getRank(), call.type, call.profile_title, tensor, place,
                                                    timeout, std::move(request), std::move(record)));
}

ProcessGroupMlsys::WorkPtr ProcessGroupMlsys::recv(std::vector<at::Tensor>& tensors, int source, int tag) {
  constexpr Call kCall{c10d::OpType::RECV, "recv", "mlsys:recv"};
  if (auto* backend = elsewhere(kCall, tensors)) return backend->recv(tensors, source, tag);
  return receive(kCall, tensors, checked_root(source, where(kCall.name)), tag);
}

ProcessGroupMlsys::WorkPtr ProcessGroupMlsys::recvAnysource(std::vector<at::Tensor>& tensors, int tag) {
  constexpr Call kCall{c10d::OpType::RECVANYSOURCE, "recv from any source", "mlsys:recvAnySource"};
  if (auto* backend = elsewhere(kCall, tensors)) return backend->recvAnysource(tensors, tag);
  return receive(kCall, tensors, comm::Communicator::kAnySource, tag);
}

bool ProcessGroupMlsys::supportsTensorAlloc(c10::DeviceIndex device) {
  if (device < 0) return true;  // CPU devices have no index; the arena is host memory
  return membership_->accelerator().available() && accelerator_backend().supportsTensorAlloc(device);
}

at::Tensor ProcessGroupMlsys::allocateTensor(long size, at::TensorOptions options) {
  const auto here = where("allocate_tensor");
  const auto& accelerator = membership_->accelerator();
  if (accelerator.available() && options.device().type() == accelerator.device_type()) {
    return accelerator_backend().allocateTensor(size, options);
  }
  if (!options.device().is_cpu()) {
    throw Refused(here + " was asked for memory on " + options.device().str() + ".",
                  "The shared arena is host memory.", "Ask for a CPU tensor.");
  }
  const size_t bytes = size * options.dtype().itemsize();
  std::shared_ptr<void> memory;
  try {
    memory = membership_->communicator().allocate(bytes);
  } catch (const std::bad_alloc& e) {
    TORCH_WARN_ONCE(here.words(), ": ", e.what(),
                    "; private memory is used instead, which costs each collective a copy.");
    return at::zeros({size}, options);
  }
  auto* data = memory.get();
  return at::from_blob(data, {size}, [memory = std::move(memory)](void*) {}, options);
}

}  // namespace mlsys::binding
