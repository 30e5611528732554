#include "bindings/comm/failures.h"

#include <torch/csrc/Exceptions.h>

#include <variant>

#include "comm/communicator.h"

namespace mlsys::binding {
namespace py = pybind11;

namespace {

struct PeerRecord {
  int rank;
  std::string host;
  int64_t pid;
  std::string cause, op;
  uint64_t sequence;
};
struct Timeout {};
struct Disagreement {};
struct Refusal {
  std::string given, expected, action;
};
using Kind = std::variant<PeerRecord, Timeout, Disagreement, Refusal>;

py::object make_error(const Kind& kind, const std::string& message) {
  const auto errors = py::module_::import("mlsys_engine.errors");
  if (const auto* peer = std::get_if<PeerRecord>(&kind)) {
    return errors.attr("PeerFailedError")(peer->rank, peer->host, peer->pid, peer->cause, peer->op,
                                          peer->sequence);
  }
  if (const auto* refusal = std::get_if<Refusal>(&kind)) {
    return errors.attr("UserError")(refusal->given, refusal->expected, refusal->action);
  }
  return errors.attr(std::holds_alternative<Timeout>(kind) ? "CollectiveTimeoutError"
                                                           : "CollectiveMismatchError")(message);
}

struct Raised final : torch::PyTorchError {
  Raised(Kind kind, std::string message) : torch::PyTorchError(std::move(message)), kind(std::move(kind)) {}

  // torch asks for a class and calls it with one message; a class made for this one failure answers with its
  // fields. Its reference is kept for good: the caller only borrows it, and failures are few.
  PyObject* python_type() override {
    const auto carriers = py::module_::import("mlsys_engine.comm.carriers");
    return carriers.attr("carrier")(make_error(kind, msg)).release().ptr();
  }

  Kind kind;
};

}  // namespace

Refused::Refused(std::string given, std::string expected, std::string action)
    : std::runtime_error(given + " " + expected + " " + action),
      given(std::move(given)),
      expected(std::move(expected)),
      action(std::move(action)) {}

std::exception_ptr for_python(std::exception_ptr failure, const Place& place) {
  try {
    std::rethrow_exception(failure);
  } catch (const comm::PeerFailed& e) {
    return std::make_exception_ptr(Raised(
        PeerRecord{e.rank, e.host, e.pid, e.cause, place.operation, place.sequence}, std::string(e.what())));
  } catch (const comm::TimedOut& e) {
    return std::make_exception_ptr(
        Raised(Timeout{}, place.words + " reached its timeout and gave up: " + e.what()));
  } catch (const comm::Mismatch& e) {
    return std::make_exception_ptr(Raised(Disagreement{}, place.words + ": " + e.what()));
  } catch (const Refused& e) {
    return std::make_exception_ptr(Raised(Refusal{e.given, e.expected, e.action}, std::string(e.what())));
  } catch (const c10::Error&) {
    return failure;
  } catch (const std::exception& e) {
    return std::make_exception_ptr(std::runtime_error(place.words + ": " + e.what()));
  } catch (...) {
    return failure;
  }
}

void register_translators() {
  py::register_exception_translator([](std::exception_ptr failure) {
    const auto raise = [](const Kind& kind, const std::string& message) {
      const auto error = make_error(kind, message);
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
    };
    try {
      if (failure) std::rethrow_exception(failure);
    } catch (const Raised& e) {
      raise(e.kind, e.msg);
    } catch (const Refused& e) {
      raise(Refusal{e.given, e.expected, e.action}, e.what());
    }
  });
}

}  // namespace mlsys::binding
