#include "bindings/comm/direct.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "bindings/comm/failures.h"
#include "bindings/comm/gil.h"
#include "bindings/comm/reduction.h"
#include "bindings/comm/tensors.h"

namespace mlsys::binding {
namespace {

namespace py = pybind11;
using c10d::OpType;
using comm::Communicator;
using std::chrono::milliseconds;
using Call = ProcessGroupMlsys::Call;
using RedOpType = c10d::ReduceOp::RedOpType;

constexpr milliseconds kOfGroup{0};
constexpr c10::DispatchKeySet kPlainKeys{c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                         c10::DispatchKey::AutocastCPU, c10::DispatchKey::ADInplaceOrView};

bool is_watched() { return at::impl::torch_function_mode_enabled() || c10::impl::dispatch_mode_enabled(); }

// The tensor behind a Python object when it is plain, else null.
const at::Tensor* plain(py::handle object) {
  if (!THPVariable_CheckExact(object.ptr())) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
  if ((tensor.key_set().raw_repr() & ~kPlainKeys.raw_repr()) != 0 || !tensor.is_contiguous() ||
      tensor.is_complex() || (tensor.requires_grad() && at::GradMode::is_enabled())) {
    return nullptr;
  }
  return &tensor;
}

// All of a list or tuple, or nothing when one is not plain.
std::optional<Tensors> all_plain(const py::sequence& objects) {
  Tensors tensors;
  for (const auto& object : objects) {
    const at::Tensor* tensor = plain(object);
    if (tensor == nullptr) return std::nullopt;
    tensors.push_back(*tensor);
  }
  return tensors;
}

bool alike(const at::Tensor& left, const at::Tensor& right, int64_t times = 1) {
  return left.scalar_type() == right.scalar_type() && left.numel() * times == right.numel();
}

bool all_alike(const at::Tensor& like, const Tensors& others, int count) {
  return others.size() == static_cast<size_t>(count) &&
         std::all_of(others.begin(), others.end(), [&](const auto& other) { return alike(like, other); });
}

std::optional<int> group_rank_of(const ProcessGroupMlsys& group, int global_rank) {
  const auto& ranks = group.membership()->options().global_ranks;
  const auto found = std::find(ranks.begin(), ranks.end(), global_rank);
  if (found == ranks.end()) return std::nullopt;
  return static_cast<int>(found - ranks.begin());
}

template <class Pointer>
std::vector<Pointer> parts_of(Pointer first, size_t bytes, int count) {
  std::vector<Pointer> parts;
  for (int rank = 0; rank < count; ++rank) {
    parts.push_back(
        static_cast<std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char*, char*>>(
            first) +
        rank * bytes);
  }
  return parts;
}

bool all_reduce_now(ProcessGroupMlsys& group, py::handle object, const c10d::ReduceOp& op) {
  constexpr Call kCall{OpType::ALLREDUCE, "all_reduce", "mlsys:all_reduce"};
  const at::Tensor* tensor = plain(object);
  if (tensor == nullptr || is_watched()) return false;
  const auto reduction = reduction_for(*tensor, op, group.where(kCall.name));
  group.run_now(kCall, *tensor, *tensor, kOfGroup, [&](Communicator& c, milliseconds timeout) {
    c.all_reduce(tensor->mutable_data_ptr(), tensor->numel(), reduction, timeout);
  });
  return true;
}

bool reduce_now(ProcessGroupMlsys& group, py::handle object, int destination, const c10d::ReduceOp& op) {
  constexpr Call kCall{OpType::REDUCE, "reduce", "mlsys:reduce"};
  const at::Tensor* tensor = plain(object);
  const auto root = group_rank_of(group, destination);
  if (tensor == nullptr || !root || is_watched()) return false;
  const auto reduction = reduction_for(*tensor, op, group.where(kCall.name));
  group.run_now(kCall, *tensor, *tensor, kOfGroup, [&](Communicator& c, milliseconds timeout) {
    c.reduce(tensor->mutable_data_ptr(), tensor->numel(), reduction, *root, timeout);
  });
  return true;
}

bool all_gather_now(ProcessGroupMlsys& group, py::handle whole, py::handle part) {
  constexpr Call kCall{OpType::_ALLGATHER_BASE, "all_gather_into_tensor", "mlsys:_all_gather_base"};
  const at::Tensor *output = plain(whole), *input = plain(part);
  if (output == nullptr || input == nullptr || !alike(*input, *output, group.getSize()) || is_watched()) {
    return false;
  }
  group.run_now(kCall, *input, *output, kOfGroup, [&](Communicator& c, milliseconds timeout) {
    c.all_gather(input->const_data_ptr(), parts_of(output->mutable_data_ptr(), input->nbytes(), c.size()),
                 input->nbytes(), timeout);
  });
  return true;
}

bool reduce_scatter_now(ProcessGroupMlsys& group, py::handle part, py::handle whole,
                        const c10d::ReduceOp& op) {
  constexpr Call kCall{OpType::_REDUCE_SCATTER_BASE, "reduce_scatter_tensor", "mlsys:_reduce_scatter_base"};
  const at::Tensor *output = plain(part), *input = plain(whole);
  if (output == nullptr || input == nullptr || !alike(*output, *input, group.getSize()) || is_watched()) {
    return false;
  }
  const auto reduction = reduction_for(*output, op, group.where(kCall.name));
  group.run_now(kCall, *input, *output, kOfGroup, [&](Communicator& c, milliseconds timeout) {
    c.reduce_scatter(parts_of(input->const_data_ptr(), output->nbytes(), c.size()),
                     output->mutable_data_ptr(), output->numel(), reduction, timeout);
  });
  return true;
}

bool broadcast_now(ProcessGroupMlsys& group, py::handle object, int source) {
  constexpr Call kCall{OpType::BROADCAST, "broadcast", "mlsys:broadcast"};
  const at::Tensor* tensor = plain(object);
  const auto root = group_rank_of(group, source);
  if (tensor == nullptr || !root || is_watched()) return false;
  group.run_now(kCall, *tensor, *tensor, kOfGroup, [&](Communicator& c, milliseconds timeout) {
    c.broadcast(tensor->mutable_data_ptr(), tensor->nbytes(), *root, timeout);
  });
  return true;
}

bool gather_now(ProcessGroupMlsys& group, py::handle object, const py::sequence& list, int destination) {
  constexpr Call kCall{OpType::GATHER, "gather", "mlsys:gather"};
  const at::Tensor* input = plain(object);
  const auto outputs = all_plain(list);
  const auto root = group_rank_of(group, destination);
  if (input == nullptr || !outputs || !root || is_watched()) return false;
  if (!all_alike(*input, *outputs, *root == group.getRank() ? group.getSize() : 0)) return false;
  group.run_now(kCall, *input, *outputs, kOfGroup, [&](Communicator& c, milliseconds timeout) {
    c.gather(input->const_data_ptr(), output_pointers(*outputs), input->nbytes(), *root, timeout);
  });
  return true;
}

bool scatter_now(ProcessGroupMlsys& group, py::handle object, const py::sequence& list, int source) {
  constexpr Call kCall{OpType::SCATTER, "scatter", "mlsys:scatter"};
  const at::Tensor* output = plain(object);
  const auto inputs = all_plain(list);
  const auto root = group_rank_of(group, source);
  if (output == nullptr || !inputs || !root || is_watched()) return false;
  if (!all_alike(*output, *inputs, *root == group.getRank() ? group.getSize() : 0)) return false;
  group.run_now(kCall, *inputs, *output, kOfGroup, [&](Communicator& c, milliseconds timeout) {
    c.scatter(input_pointers(*inputs), output->mutable_data_ptr(), output->nbytes(), *root, timeout);
  });
  return true;
}

bool all_to_all_now(ProcessGroupMlsys& group, const py::sequence& to, const py::sequence& from) {
  constexpr Call kCall{OpType::ALLTOALL, "all_to_all", "mlsys:all_to_all"};
  const auto outputs = all_plain(to), inputs = all_plain(from);
  const auto size = static_cast<size_t>(group.getSize());
  if (!outputs || !inputs || outputs->size() != size || inputs->size() != size || is_watched()) return false;
  const auto one_dtype = [&](const at::Tensor& t) { return t.scalar_type() == (*inputs)[0].scalar_type(); };
  if (!std::all_of(inputs->begin(), inputs->end(), one_dtype) ||
      !std::all_of(outputs->begin(), outputs->end(), one_dtype)) {
    return false;
  }
  const auto bytes_of = [](const Tensors& tensors) {
    std::vector<size_t> bytes;
    for (const auto& tensor : tensors) bytes.push_back(tensor.nbytes());
    return bytes;
  };
  group.run_now(kCall, *inputs, *outputs, kOfGroup, [&](Communicator& c, milliseconds timeout) {
    c.all_to_all(input_pointers(*inputs), bytes_of(*inputs), output_pointers(*outputs), bytes_of(*outputs),
                 timeout);
  });
  return true;
}

bool barrier_now(ProcessGroupMlsys& group, double timeout_s) {
  constexpr Call kCall{OpType::BARRIER, "barrier", "mlsys:barrier"};
  if (is_watched()) return false;
  const milliseconds timeout(static_cast<int64_t>(std::ceil(timeout_s * 1e3)));
  group.run_now(kCall, {}, {}, timeout, [](Communicator& c, milliseconds limit) { c.barrier(limit); });
  return true;
}

bool send_now(ProcessGroupMlsys& group, py::handle object, int destination, int tag) {
  constexpr Call kCall{OpType::SEND, "send", "mlsys:send"};
  const at::Tensor* tensor = plain(object);
  const auto peer = group_rank_of(group, destination);
  if (tensor == nullptr || !peer || *peer == group.getRank() || is_watched()) return false;
  group.message_now(kCall, *tensor, group.getRank(), *peer, [&](Communicator& c) {
    return c.send(tensor->const_data_ptr(), tensor->nbytes(), *peer, tag);
  });
  return true;
}

// The sender's global rank, or nothing when the call is not plain. `source` is nothing for any source.
std::optional<int> recv_now(ProcessGroupMlsys& group, py::handle object, std::optional<int> source, int tag) {
  constexpr Call kCall{OpType::RECV, "recv", "mlsys:recv"};
  const at::Tensor* tensor = plain(object);
  const auto peer = source ? group_rank_of(group, *source) : Communicator::kAnySource;
  if (tensor == nullptr || !peer || *peer == group.getRank() || is_watched()) return std::nullopt;
  const int sender = group.message_now(kCall, *tensor, *peer, group.getRank(), [&](Communicator& c) {
    return c.recv(tensor->mutable_data_ptr(), tensor->nbytes(), *peer, tag);
  });
  return group.membership()->global_rank_of(sender);
}

// What the profiler shows of the call, when one runs.
class Profile {
 public:
  Profile(const Call& call, at::TensorList inputs) : function_(at::RecordScope::USER_SCOPE) {
    if (!function_.isActive()) return;
    const std::vector<c10::IValue> recorded(inputs.begin(), inputs.end());
    function_.before(call.profile_title, c10::ArrayRef<const c10::IValue>(recorded.data(), recorded.size()));
  }

 private:
  at::RecordFunction function_;
};

// An operation arrives as the enumerator or, with a factor, as a ReduceOp. Two overloads spare the usual case
// the conversion, which would call back into Python.
template <auto kFunction, class... Before>
void define_reducing(ProcessGroupClass& process_group, const char* name) {
  process_group.def(name, [](ProcessGroupMlsys& group, Before... before, RedOpType op) {
    return kFunction(group, before..., op);
  });
  process_group.def(name, [](ProcessGroupMlsys& group, Before... before, const c10d::ReduceOp& op) {
    return kFunction(group, before..., op);
  });
}

}  // namespace

void ProcessGroupMlsys::run_now(const Call& call, at::TensorList inputs, at::TensorList outputs,
                                milliseconds timeout, Blocking body) {
  const uint64_t sequence = ++issued_;
  const milliseconds limit = timeout > milliseconds(0) ? timeout : milliseconds(timeout_ms_);
  const Profile profile(call, inputs);
  const Record record(recorded_, {call.type, call.name, sequence, limit}, inputs, outputs);
  const WithoutGil released;
  try {
    membership_->executor().run([&] {
      record.started();
      body(membership_->communicator(), limit);
    });
    record.completed();
  } catch (...) {
    const Place place{call.name, sequence, where(call.name).words()};
    std::rethrow_exception(membership_->told(std::current_exception(), place, record));
  }
}

int ProcessGroupMlsys::message_now(const Call& call, const at::Tensor& tensor, int source, int destination,
                                   Posting post) {
  const uint64_t sequence = ++messages_;
  const milliseconds limit(timeout_ms_);
  const Profile profile(call, tensor);
  const at::TensorList it = tensor;
  const bool sending = call.type == OpType::SEND;
  const Record record(recorded_, {call.type, call.name, sequence, limit, source, destination},
                      sending ? it : at::TensorList(), sending ? at::TensorList() : it);
  const WithoutGil released;
  try {
    record.started();
    const auto request = post(membership_->communicator());
    request->wait(limit);
    record.completed();
    return request->source_rank();
  } catch (...) {
    const Place place{call.name, sequence, where(call.name).words()};
    std::rethrow_exception(membership_->told(std::current_exception(), place, record));
  }
}

void define_direct_calls(ProcessGroupClass& process_group) {
  define_reducing<all_reduce_now, py::handle>(process_group, "all_reduce_now");
  define_reducing<reduce_now, py::handle, int>(process_group, "reduce_now");
  define_reducing<reduce_scatter_now, py::handle, py::handle>(process_group, "reduce_scatter_now");
  process_group.def("all_gather_now", &all_gather_now)
      .def("broadcast_now", &broadcast_now)
      .def("gather_now", &gather_now)
      .def("scatter_now", &scatter_now)
      .def("all_to_all_now", &all_to_all_now)
      .def("barrier_now", &barrier_now)
      .def("send_now", &send_now)
      .def("recv_now", &recv_now);
}

}  // namespace mlsys::binding
