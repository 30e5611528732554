#include "comm/recorder/dump.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <filesystem>

#include "comm/recorder/pickle.h"
#include "memory/posix.h"

namespace mlsys::comm {
namespace {

class Writer : public PickleWriter {
 public:
  void put(const char* key, std::string_view value) { text(key), text(value); }
  void put(const char* key, int64_t value) { text(key), integer(value); }
  void put_flag(const char* key, bool value) { text(key), boolean(value); }
  void put_time(const char* key, int64_t ns) {
    text(key);
    if (ns == 0) {
      none();
    } else {
      integer(ns);
    }
  }
};

void put_shapes(Writer& out, const std::string& kind, const Shapes& shapes) {
  out.text(kind + "_sizes");
  out.begin_list();
  for (size_t i = 0, dim = 0; i < shapes.num_tensors; ++i) {
    out.begin_list();
    for (size_t end = dim + shapes.dims_of[i]; dim < end; ++dim) out.integer(shapes.dims[dim]);
    out.end_list();
  }
  out.end_list();
  out.text(kind + "_dtypes");
  out.begin_list();
  for (size_t i = 0; i < shapes.num_tensors; ++i) out.text(shapes.dtypes[i]);
  out.end_list();
}

// "gloo:", because torch's tools refuse backends that they do not know.
std::string profiling_name(const Recorder::Entry& entry) {
  const std::string name = std::string("gloo:") + entry.call.title;
  if (!entry.call.is_message) return name;
  const auto source = std::to_string(entry.call.source), target = std::to_string(entry.call.destination);
  return name + " " +
         (entry.call.destination == entry.group->rank ? target + "<-" + source : source + "->" + target);
}

const char* description(const RecordedGroup& group, size_t world) {
  return group.global_ranks.size() == world ? "default_pg" : "undefined";
}

void put_frames(Writer& out, const Recorder::Entry& entry) {
  if (entry.frames.empty()) return;
  out.text("frames");
  out.begin_list();
  for (const Frame& frame : entry.frames) {
    out.begin_dict();
    out.put("name", frame.function);
    out.put("filename", frame.file);
    out.put("line", frame.line);
    out.end_dict();
  }
  out.end_list();
}

void put_entry(Writer& out, const Recorder::Entry& entry, size_t world, int64_t group_id) {
  const RecordedCall& call = entry.call;
  out.begin_dict();
  put_frames(out, entry);
  out.put("record_id", static_cast<int64_t>(entry.id - 1));
  out.put("pg_id", group_id);
  out.text("process_group");
  out.text(entry.group->name), out.text(description(*entry.group, world)), out.pair();
  out.put("thread_id", std::to_string(entry.thread));
  out.put("collective_seq_id", call.is_message ? 0 : static_cast<int64_t>(call.sequence));
  out.put("p2p_seq_id", call.is_message ? static_cast<int64_t>(call.sequence) : 0);
  out.put("op_id", static_cast<int64_t>(call.sequence));
  out.put("profiling_name", profiling_name(entry));
  out.put("time_created_ns", entry.created_ns);
  put_shapes(out, "input", call.inputs);
  put_shapes(out, "output", call.outputs);
  out.put("state", entry.completed_ns != 0 ? "completed" : entry.started_ns != 0 ? "started" : "scheduled");
  out.put_time("time_discovered_started_ns", entry.started_ns);
  out.put_time("time_discovered_completed_ns", entry.completed_ns);
  out.put_flag("retired", entry.completed_ns != 0 || !entry.failure.empty());
  out.put("timeout_ms", call.timeout_ms);
  out.put_flag("is_p2p", call.is_message);
  out.put("mlsys_operation", call.name);
  out.put("mlsys_failure_kind", entry.failure_kind);
  out.put("mlsys_failure", entry.failure);
  out.end_dict();
}

struct Status {
  int64_t enqueued = 0, started = 0, completed = 0;
};

void put_groups(Writer& out, const std::vector<std::shared_ptr<const RecordedGroup>>& groups, size_t world) {
  out.text("pg_config");
  out.begin_dict();
  for (const auto& group : groups) {
    std::string ranks;
    for (const int rank : group->global_ranks) ranks += (ranks.empty() ? "" : ", ") + std::to_string(rank);
    out.text(group->name);
    out.begin_dict();
    out.put("name", group->name);
    out.put("desc", description(*group, world));
    out.put("ranks", "[" + ranks + "]");
    out.end_dict();
  }
  out.end_dict();
}

void put_status(Writer& out, const std::vector<Recorder::Entry>& entries,
                const std::vector<std::shared_ptr<const RecordedGroup>>& groups) {
  out.text("pg_status");
  out.begin_dict();
  for (size_t i = 0; i < groups.size(); ++i) {
    Status status;
    for (const auto& entry : entries) {
      if (entry.group->name != groups[i]->name || entry.call.is_message) continue;
      const auto sequence = static_cast<int64_t>(entry.call.sequence);
      status.enqueued = std::max(status.enqueued, sequence);
      if (entry.started_ns != 0) status.started = std::max(status.started, sequence);
      if (entry.completed_ns != 0) status.completed = std::max(status.completed, sequence);
    }
    out.text(std::to_string(i));
    out.begin_dict();
    out.put("last_enqueued_collective", status.enqueued);
    out.put("last_started_collective", status.started);
    out.put("last_completed_collective", status.completed);
    out.end_dict();
  }
  out.end_dict();
}

std::string host_name() {
  char name[256] = {};
  (void)::gethostname(name, sizeof(name) - 1);
  return name;
}

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

}  // namespace

std::string dump_bytes(const Recorder& recorder, int global_rank, const std::string& reason) {
  const std::vector<Recorder::Entry> entries = recorder.entries();
  auto groups = recorder.groups();
  const auto index_of = [&](const RecordedGroup& group) {
    size_t i = 0;
    while (i < groups.size() && groups[i]->name != group.name) ++i;
    return i;
  };
  for (const auto& entry : entries) {
    if (index_of(*entry.group) == groups.size()) groups.push_back(entry.group);
  }
  size_t world = 0;
  for (const auto& group : groups) world = std::max(world, group->global_ranks.size());
  Writer out;
  out.begin_dict();
  out.put("version", "2.10");
  out.put("comm_lib_version", "mlsys");
  put_groups(out, groups, world);
  put_status(out, entries, groups);
  out.text("entries");
  out.begin_list();
  for (const auto& entry : entries) {
    put_entry(out, entry, world, static_cast<int64_t>(index_of(*entry.group)));
  }
  out.end_list();
  out.text("mlsys");
  out.begin_dict();
  out.put("rank", global_rank);
  out.put("world_size", static_cast<int64_t>(world));
  out.put("host", host_name());
  out.put("pid", ::getpid());
  out.put("time_ns", now_ns());
  out.put("reason", reason);
  out.end_dict();
  out.end_dict();
  return std::move(out).finish();
}

std::string write_dump(const Recorder& recorder, const std::string& dir, int global_rank,
                       const std::string& reason) {
  const std::string bytes = dump_bytes(recorder, global_rank, reason);
  std::filesystem::create_directories(dir);
  const std::string path = dir + "/" + kDumpPrefix + std::to_string(global_rank);
  // Does not contain the prefix, so that tools pass over it when a kill leaves it behind.
  const std::string partial = dir + "/partial-" + std::to_string(::getpid()) + ".tmp";
  {
    const UniqueFd file(::open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    if (!file) throw_errno("open of a hang dump");
    for (size_t done = 0; done < bytes.size();) {
      const ssize_t n = ::write(file.get(), bytes.data() + done, bytes.size() - done);
      if (n < 0 && errno != EINTR) throw_errno("write of a hang dump");
      if (n > 0) done += static_cast<size_t>(n);
    }
  }
  if (::rename(partial.c_str(), path.c_str()) != 0) throw_errno("rename of a hang dump");
  return path;
}

}  // namespace mlsys::comm
