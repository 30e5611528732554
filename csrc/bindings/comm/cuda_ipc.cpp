// The all-reduce between the GPUs of one host (csrc/comm/cuda) as torch's tensors, streams and Works see it.
// Compiled to nothing in builds without CUDA.
#include "bindings/comm/cuda_ipc.h"

#ifdef MLSYS_CUDA

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/chrono.h>
#include <pybind11/stl.h>

#include <utility>

#include "bindings/comm/accelerator.h"
#include "bindings/comm/failures.h"
#include "comm/cuda/all_reduce.h"

namespace mlsys::binding {
namespace {

namespace py = pybind11;
using c10::ivalue::Future;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

std::optional<comm::ElementType> element_type(at::ScalarType type) {
  if (type == at::kFloat) return comm::ElementType::kFloat32;
  if (type == at::kHalf) return comm::ElementType::kFloat16;
  if (type == at::kBFloat16) return comm::ElementType::kBFloat16;
  return std::nullopt;
}

std::optional<comm::ReduceOp> reduce_op(const c10d::ReduceOp& op) {
  if (op.op_ == c10d::ReduceOp::SUM) return comm::ReduceOp::kSum;
  if (op.op_ == c10d::ReduceOp::AVG) return comm::ReduceOp::kAvg;
  return std::nullopt;
}

// A kernel in the stream that was current at the call. As with NCCL, wait() makes the stream that is current
// then wait, and not the host.
class StreamWork final : public c10d::Work {
 public:
  StreamWork(int rank, at::Tensor tensor, const c10::Stream& stream)
      : c10d::Work(rank, c10d::OpType::ALLREDUCE, "mlsys:all_reduce", std::vector<at::Tensor>{tensor}),
        outputs_{std::move(tensor)},
        stream_(stream),
        done_(stream.device_type()) {
    done_.record(stream_);
    finish();
  }

  bool isCompleted() override { return done_.query(); }
  bool wait(std::chrono::milliseconds) override {
    const c10::impl::VirtualGuardImpl guard(stream_.device_type());
    const c10::Stream current = guard.getStream(stream_.device());
    if (current != stream_) done_.block(current);
    return true;
  }
  void synchronize() override { wait(kNoTimeout); }
  std::vector<at::Tensor> result() override { return outputs_; }
  c10::intrusive_ptr<Future> getFuture() override {
    wait(kNoTimeout);  // a future orders its readers after the current stream
    auto future = c10::make_intrusive<Future>(c10::ListType::create(c10::TensorType::get()),
                                              std::vector<c10::Device>{stream_.device()});
    future->markCompleted(c10::IValue(outputs_));
    return future;
  }

 private:
  const std::vector<at::Tensor> outputs_;
  const c10::Stream stream_;
  c10::Event done_;
};

class CudaIpcAllReduce final : public SmallAllReduce {
 public:
  CudaIpcAllReduce(int device, int rank, int size, size_t most_bytes, std::chrono::milliseconds timeout)
      : device_(c10::kCUDA, static_cast<c10::DeviceIndex>(device)),
        rank_(rank),
        limit_bytes_(most_bytes),
        native_(device, rank, size, most_bytes, timeout) {}

  comm::cuda::IpcAllReduce& native() { return native_; }
  void set_limit(size_t bytes) { limit_bytes_ = std::min(bytes, native_.most_bytes()); }

  WorkPtr all_reduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override {
    if (tensors.size() != 1) return nullptr;
    const at::Tensor& tensor = tensors[0];
    const auto dtype = element_type(tensor.scalar_type());
    const auto op = reduce_op(options.reduceOp);
    if (!dtype || !op || tensor.layout() != at::kStrided || !tensor.is_non_overlapping_and_dense() ||
        tensor.nbytes() > limit_bytes_) {
      return nullptr;
    }
    if (tensor.device() != device_) {
      throw Refused(
          "all_reduce was given a tensor on " + tensor.device().str() + ".",
          "The CUDA IPC all-reduce of this group works on " + device_.str() + ", where its first tensor was.",
          "Keep one device a rank, or set MLSYS_CUDA_ALLREDUCE=nccl.");
    }
    const c10::impl::VirtualGuardImpl guard(c10::kCUDA);
    const c10::Stream stream = guard.getStream(device_);
    native_.all_reduce(tensor.mutable_data_ptr(), static_cast<size_t>(tensor.numel()), *dtype, *op,
                       guard.getStreamNativeHandle(stream));
    return c10::make_intrusive<StreamWork>(rank_, tensor, stream);
  }
  void stop() override { native_.stop(); }
  std::string failure() const override { return native_.failure(); }

 private:
  const c10::Device device_;
  const int rank_;
  size_t limit_bytes_;
  comm::cuda::IpcAllReduce native_;
};

std::vector<uint8_t> bytes_of(const py::bytes& object) {
  const std::string_view view = object;
  return {view.begin(), view.end()};
}

}  // namespace

void define_cuda_ipc(pybind11::module_& m) {
  using std::chrono::milliseconds;
  py::class_<CudaIpcAllReduce, SmallAllReduce, std::shared_ptr<CudaIpcAllReduce>>(m, "CudaIpcAllReduce")
      .def(py::init<int, int, int, size_t, milliseconds>(), py::arg("device"), py::arg("rank"),
           py::arg("size"), py::arg("most_bytes"), py::arg("timeout"))
      .def("share",
           [](CudaIpcAllReduce& self) {
             const auto handle = self.native().share();
             return py::bytes(reinterpret_cast<const char*>(handle.data()), handle.size());
           })
      .def("open",
           [](CudaIpcAllReduce& self, const std::vector<py::bytes>& handles) {
             std::vector<std::vector<uint8_t>> all;
             for (const auto& handle : handles) all.push_back(bytes_of(handle));
             self.native().open(all);
           })
      .def("set_limit", &CudaIpcAllReduce::set_limit)
      .def(
          "all_reduce",
          [](CudaIpcAllReduce& self, at::Tensor tensor, const c10d::AllreduceOptions& options) {
            std::vector<at::Tensor> tensors{std::move(tensor)};
            return self.all_reduce(tensors, options);
          },
          py::call_guard<py::gil_scoped_release>())
      .def("stop", &CudaIpcAllReduce::stop)
      .def("failure", &CudaIpcAllReduce::failure);
}

}  // namespace mlsys::binding

#else

namespace mlsys::binding {

void define_cuda_ipc(pybind11::module_&) {}

}  // namespace mlsys::binding

#endif
