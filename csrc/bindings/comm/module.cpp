// The Python module mlsys_engine.native._comm.
#include <c10/util/Logging.h>
#include <pybind11/chrono.h>
#include <pybind11/functional.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <utility>

#include "bindings/comm/cuda_ipc.h"
#include "bindings/comm/direct.h"
#include "bindings/comm/failures.h"
#include "bindings/comm/mpi_job.h"
#include "bindings/comm/store_adapter.h"
#include "comm/recorder/dump.h"

namespace py = pybind11;

namespace mlsys::binding {
namespace {

// What atexit keeps: ends the membership if it still lives, without keeping it alive.
struct Farewell {
  std::weak_ptr<Membership> membership;
  void say() const {
    if (const auto alive = membership.lock()) alive->leave(std::chrono::milliseconds(1000));
  }
};

c10::intrusive_ptr<ProcessGroupMlsys> create(
    const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, std::chrono::milliseconds timeout,
    std::string group_name, std::vector<int> global_ranks, std::vector<int> locality, std::string job_key,
    int sockets_per_peer, const c10::intrusive_ptr<ProcessGroupMlsys>& job, const std::string& accelerator,
    Accelerator::Maker make_accelerator, Accelerator::SmallMaker make_small, std::optional<MpiJob> mpi) {
  comm::Options options;
  options.rank = rank;
  options.size = size;
  options.timeout = timeout;
  options.group_name = std::move(group_name);
  options.global_ranks = std::move(global_ranks);
  options.locality = std::move(locality);
  options.job_key = std::move(job_key);
  options.sockets_per_peer = sockets_per_peer;
  if (mpi) {
    options.make_carrier = [mpi_job = std::move(*mpi), sockets_per_peer](comm::CarrierUse use) {
      return make_mpi_carrier(mpi_job, use, sockets_per_peer);
    };
  }
  if (job) {
    options.job = job->membership()->shared_communicator();
    if (options.job_key.empty()) options.job_key = job->membership()->options().job_key;
  }
  options.report = [place = "mlsys: rank " + std::to_string(options.global_ranks[static_cast<size_t>(rank)]) +
                            ", group " + options.group_name +
                            ": "](const std::string& line) { LOG(WARNING) << place << line; };
  return c10::make_intrusive<ProcessGroupMlsys>(
      std::make_shared<Membership>(adapt_store(store), std::move(options), c10::Device(accelerator).type(),
                                   std::move(make_accelerator), std::move(make_small)));
}

py::dict counters(const ProcessGroupMlsys& group) {
  const auto counted = group.membership()->communicator().counters();
  py::dict result;
  result["operations"] = counted.operations;
  result["shm_bytes"] = counted.shm_bytes;
  result["tcp_bytes_sent"] = counted.tcp_bytes_sent;
  result["tcp_bytes_received"] = counted.tcp_bytes_received;
  result["mpi_bytes_sent"] = counted.mpi_bytes_sent;
  result["mpi_bytes_received"] = counted.mpi_bytes_received;
  result["zero_copy_operations"] = counted.zero_copy_operations;
  result["strangers"] = counted.strangers;
  return result;
}

}  // namespace
}  // namespace mlsys::binding

namespace {

void configure_recorder(size_t num_entries, bool detail, std::string hang_dir) {
  mlsys::comm::Recorder::configure({num_entries, detail, std::move(hang_dir)});
}

std::string dump(const std::string& directory, int rank) {
  return mlsys::comm::write_dump(mlsys::comm::Recorder::of_process(), directory, rank,
                                 "asked by the program");
}

}  // namespace

PYBIND11_MODULE(_comm, m) {
  using namespace mlsys::binding;
  namespace comm = mlsys::comm;
  const auto c10d = py::module_::import("torch._C._distributed_c10d");  // registers Store and Backend
  register_translators();

  py::class_<Farewell>(m, "Farewell").def("say", &Farewell::say, py::call_guard<py::gil_scoped_release>());

  py::class_<SmallAllReduce, std::shared_ptr<SmallAllReduce>>(m, "SmallAllReduce");
  define_cuda_ipc(m);

  py::class_<MpiJob>(m, "MpiJob")
      .def(py::init<std::string, int, uint64_t, uint64_t, std::vector<int>, int>(), py::kw_only(),
           py::arg("extension"), py::arg("handle_bytes"), py::arg("communicator"), py::arg("byte_type"),
           py::arg("ranks"), py::arg("first_tag"))
      .def_readonly_static("NUM_TAGS", &MpiJob::kNumTags);

  ProcessGroupClass process_group(m, "ProcessGroupMlsys", c10d.attr("Backend"));
  define_direct_calls(process_group);
  process_group.def("counters", &counters)
      .def("connect", &ProcessGroupMlsys::connect, py::call_guard<py::gil_scoped_release>())
      .def(
          "poison",
          [](ProcessGroupMlsys& group, const std::string& cause) {
            group.membership()->communicator().poison(cause);
          },
          py::call_guard<py::gil_scoped_release>())
      .def("in_arena",
           [](ProcessGroupMlsys& group, uintptr_t address, size_t bytes) {
             return group.membership()->communicator().in_arena(reinterpret_cast<const void*>(address),
                                                                bytes);
           })
      .def(
          "reduce_shard",
          [](ProcessGroupMlsys& group, const at::Tensor& data, std::vector<size_t> partition,
             const std::optional<at::Tensor>& chunks, const std::optional<at::Tensor>& sums, bool async) {
            return group.reduce_shard(data, std::move(partition), chunks.value_or(at::Tensor()),
                                      sums.value_or(at::Tensor()), async);
          },
          py::arg("data"), py::arg("partition"), py::arg("chunks"), py::arg("sums"), py::arg("async_op"),
          py::call_guard<py::gil_scoped_release>())
      .def(
          "reduce_scatter_optimize_all_gather",
          [](ProcessGroupMlsys& group, const at::Tensor& gradients, const at::Tensor& parameters,
             std::vector<size_t> partition, bool is_reduced, std::string rule, const at::Tensor& segments,
             const at::Tensor& hyper, const at::Tensor& steps, double grad_scale, bool async) {
            return group.fused_step(gradients, parameters, std::move(partition), is_reduced,
                                    {std::move(rule), segments, hyper, steps, grad_scale}, async);
          },
          py::arg("gradients"), py::arg("parameters"), py::arg("partition"), py::arg("is_reduced"),
          py::arg("rule"), py::arg("segments"), py::arg("hyper"), py::arg("steps"), py::arg("grad_scale"),
          py::arg("async_op"), py::call_guard<py::gil_scoped_release>())
      .def("share_shards", &ProcessGroupMlsys::share_shards, py::arg("data"), py::arg("partition"),
           py::arg("async_op"), py::call_guard<py::gil_scoped_release>())
      .def("describe_transports",
           [](ProcessGroupMlsys& group) { return group.membership()->communicator().describe_transports(); })
      .def("all_reduce_tree", &ProcessGroupMlsys::all_reduce_tree, py::call_guard<py::gil_scoped_release>())
      .def("reduce_scatter_tree", &ProcessGroupMlsys::reduce_scatter_tree,
           py::call_guard<py::gil_scoped_release>())
      .def("all_reduce_compressed", &ProcessGroupMlsys::all_reduce_compressed,
           py::call_guard<py::gil_scoped_release>())
      .def("num_hosts",
           [](ProcessGroupMlsys& group) { return group.membership()->communicator().num_hosts(); })
      .def("expect_present", &ProcessGroupMlsys::expect_present, py::call_guard<py::gil_scoped_release>())
      .def("present", [](ProcessGroupMlsys& group) { return group.membership()->communicator().present(); })
      .def("has_left", [](ProcessGroupMlsys& group,
                          int rank) { return group.membership()->communicator().has_left(rank); })
      .def("post_notice",
           [](ProcessGroupMlsys& group, const std::string& text) {
             group.membership()->communicator().post_notice(text);
           })
      .def("notice",
           [](ProcessGroupMlsys& group, int rank) { return group.membership()->communicator().notice(rank); })
      .def("farewell", [](ProcessGroupMlsys& group) { return Farewell{group.membership()}; });

  m.def("configure_recorder", &configure_recorder, py::arg("num_entries"), py::arg("detail"),
        py::arg("hang_dir"));
  m.def("dump", &dump, py::arg("directory"), py::arg("rank"), py::call_guard<py::gil_scoped_release>());
  m.def("create", &create, py::arg("store"), py::arg("rank"), py::arg("size"), py::arg("timeout"),
        py::arg("group_name"), py::arg("global_ranks"), py::arg("locality"), py::arg("job_key"),
        py::arg("sockets_per_peer"), py::arg("job") = py::none(), py::arg("accelerator") = "cuda",
        py::arg("make_accelerator") = py::none(), py::arg("make_small") = py::none(),
        py::arg("mpi") = py::none(), py::call_guard<py::gil_scoped_release>());
}
