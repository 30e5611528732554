#include "bindings/comm/record.h"

#include <c10/core/ScalarType.h>

#include <utility>

#include "bindings/comm/call_site.h"
#include "comm/communicator.h"
#include "comm/recorder/hang_watch.h"

namespace mlsys::binding {
namespace {

// The names that torch's flight-recorder tools know. The list forms of all_gather and reduce_scatter take
// those of the coalesced ones: of the plain names the tools expect the concatenated tensor.
const char* title_of(c10d::OpType type) {
  using c10d::OpType;
  switch (type) {
    case OpType::ALLREDUCE_COALESCED:
      return "allreduce_coalesced";
    case OpType::REDUCE:
      return "reduce";
    case OpType::REDUCE_SCATTER:
      return "REDUCE_SCATTER_coalesced";
    case OpType::_REDUCE_SCATTER_BASE:
      return "_reduce_scatter_base";
    case OpType::REDUCE_SCATTER_TENSOR_COALESCED:
      return "reduce_scatter_tensor_coalesced";
    case OpType::BROADCAST:
      return "broadcast";
    case OpType::ALLGATHER:
      return "ALLGATHER_coalesced";
    case OpType::_ALLGATHER_BASE:
      return "_all_gather_base";
    case OpType::ALLGATHER_COALESCED:
      return "ALLGATHER_coalesced";
    case OpType::GATHER:
      return "gather";
    case OpType::SCATTER:
      return "scatter";
    case OpType::ALLTOALL:
    case OpType::ALLTOALL_BASE:
      return "all_to_all";
    case OpType::BARRIER:
      return "barrier";
    case OpType::SEND:
      return "send";
    case OpType::RECV:
    case OpType::RECVANYSOURCE:
      return "recv";
    default:
      return "all_reduce";
  }
}

bool is_message(c10d::OpType type) {
  return type == c10d::OpType::SEND || type == c10d::OpType::RECV || type == c10d::OpType::RECVANYSOURCE;
}

comm::Shapes shapes_of(at::TensorList tensors) {
  comm::Shapes shapes;
  for (const auto& tensor : tensors) {
    const auto sizes = tensor.sizes();
    shapes.add({sizes.data(), sizes.size()}, c10::toString(tensor.scalar_type()));
  }
  return shapes;
}

}  // namespace

Record::Record(const std::shared_ptr<const comm::RecordedGroup>& group, const RecordedOperation& operation,
               at::TensorList inputs, at::TensorList outputs) {
  comm::Recorder& recorder = comm::Recorder::of_process();
  if (recorder.options().num_entries == 0) return;
  comm::start_hang_watch(recorder);
  comm::RecordedCall call;
  call.name = operation.name;
  call.title = title_of(operation.type);
  call.sequence = operation.sequence;
  call.is_message = is_message(operation.type);
  call.source = operation.source;
  call.destination = operation.destination;
  call.timeout_ms = operation.timeout.count();
  call.inputs = shapes_of(inputs);
  call.outputs = shapes_of(outputs);
  std::vector<comm::Frame> frames;
  if (recorder.options().detail) {
    frames = python_frames();
    call_site_ = binding::call_site(frames);
  }
  id_ = recorder.begin(group, call, std::move(frames));
}

void Record::started() const {
  if (id_ != 0) comm::Recorder::of_process().started(id_);
}

void Record::completed() const {
  if (id_ != 0) comm::Recorder::of_process().completed(id_);
}

void Record::failed(std::exception_ptr failure) const {
  if (id_ == 0) return;
  const char* kind = "error";
  std::string text;
  try {
    std::rethrow_exception(failure);
  } catch (const comm::TimedOut& e) {
    kind = "timeout", text = e.what();
  } catch (const comm::Mismatch& e) {
    kind = "mismatch", text = e.what();
  } catch (const comm::PeerFailed& e) {
    kind = "peer_failed", text = e.what();
  } catch (const std::exception& e) {
    text = e.what();
  }
  comm::Recorder& recorder = comm::Recorder::of_process();
  recorder.failed(id_, kind, text);
  if (std::string_view(kind) != "error") comm::dump_failure(recorder, std::string(kind) + ": " + text);
}

}  // namespace mlsys::binding
