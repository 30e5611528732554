// The last operations of every group of this process, always on: what a hang is explained from.
//
// A ring of fixed size under one mutex. Callers, the executors and the messengers' threads write it; an
// operation costs three short locked sections and allocates nothing unless call sites are recorded. The
// entries carry what c10d's flight recorder carries, and a dump (see dump.h) has its schema.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

namespace mlsys::comm {

struct RecorderOptions {
  size_t num_entries = 2000;  // 0: nothing is recorded
  bool detail = false;        // whether callers record Python frames
  std::string hang_dir;       // where failures, SIGUSR2 and other ranks' dumps make this rank dump; or empty
};

struct RecordedGroup {
  std::string name;
  std::vector<int> global_ranks;
  int rank = 0;  // of this process in the group
};

struct Frame {
  std::string function, file;
  int line = 0;
};

// Sizes and dtypes of an operation's tensors: the first few, with as many dimensions as there is room for.
struct Shapes {
  static constexpr size_t kMaxTensors = 8, kMaxDims = 16;
  uint8_t num_tensors = 0, num_dims = 0;
  std::array<uint8_t, kMaxTensors> dims_of{};
  std::array<const char*, kMaxTensors> dtypes{};  // static strings, in c10d's spelling
  std::array<int64_t, kMaxDims> dims{};

  void add(std::span<const int64_t> sizes, const char* dtype);
};

// What is known of an operation when it is called. Strings are static.
struct RecordedCall {
  const char* name = "";   // as messages call it, "all_reduce_tree"
  const char* title = "";  // as c10d's tools know it, "all_reduce"
  uint64_t sequence = 0;   // among the group's collectives, or its messages
  bool is_message = false;
  int source = -1, destination = -1;  // of a message, group ranks; -1 for any source
  int64_t timeout_ms = 0;
  Shapes inputs, outputs;
};

class Recorder {
 public:
  struct Entry {
    uint64_t id = 0;  // counts from 1; 0 is a free slot
    std::shared_ptr<const RecordedGroup> group;
    RecordedCall call;
    int64_t created_ns = 0, started_ns = 0, completed_ns = 0;  // since the epoch; 0: not yet
    int thread = 0;
    std::string failure_kind, failure;
    std::vector<Frame> frames;
  };

  explicit Recorder(RecorderOptions options);

  // The process's own, made at the first use and never destroyed, since threads may record until the very
  // end. A forked child gets a fresh one.
  static Recorder& of_process();
  // Takes effect unless the process has recorded already.
  static void configure(const RecorderOptions& options);

  const RecorderOptions& options() const { return options_; }
  void add_group(std::shared_ptr<const RecordedGroup> group);

  // The entry's id, 0 when recording is off. The frames may be empty.
  uint64_t begin(const std::shared_ptr<const RecordedGroup>& group, const RecordedCall& call,
                 std::vector<Frame> frames);
  void started(uint64_t id);
  void completed(uint64_t id);
  // `kind` is "timeout", "mismatch", "peer_failed" or "error".
  void failed(uint64_t id, const char* kind, const std::string& text);

  std::vector<Entry> entries() const;  // oldest first
  std::vector<std::shared_ptr<const RecordedGroup>> groups() const;
  // Of this process in the job, from the largest group; -1 before there is one.
  int global_rank() const;

 private:
  Entry* find(uint64_t id);

  const RecorderOptions options_;
  mutable std::mutex mutex_;
  std::vector<Entry> ring_;
  uint64_t last_id_ = 0;
  std::vector<std::shared_ptr<const RecordedGroup>> groups_;
};

}  // namespace mlsys::comm
