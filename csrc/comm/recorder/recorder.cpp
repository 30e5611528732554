#include "comm/recorder/recorder.h"

#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

namespace mlsys::comm {
namespace {

std::atomic<Recorder*> process_recorder{nullptr};
std::mutex making;  // also guards wanted()

RecorderOptions& wanted() {
  static RecorderOptions options;
  return options;
}

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

int this_thread() {
  thread_local const int id = static_cast<int>(::syscall(SYS_gettid));
  return id;
}

}  // namespace

void Shapes::add(std::span<const int64_t> sizes, const char* dtype) {
  if (num_tensors == kMaxTensors || num_dims + sizes.size() > kMaxDims) return;
  std::copy(sizes.begin(), sizes.end(), dims.begin() + num_dims);
  dtypes[num_tensors] = dtype;
  dims_of[num_tensors++] = static_cast<uint8_t>(sizes.size());
  num_dims = static_cast<uint8_t>(num_dims + sizes.size());
}

Recorder::Recorder(RecorderOptions options) : options_(std::move(options)), ring_(options_.num_entries) {}

Recorder& Recorder::of_process() {
  if (Recorder* ready = process_recorder.load(std::memory_order_acquire)) return *ready;
  const std::lock_guard lock(making);
  if (Recorder* ready = process_recorder.load(std::memory_order_acquire)) return *ready;
  static const int registered = ::pthread_atfork(nullptr, nullptr, [] { process_recorder.store(nullptr); });
  (void)registered;  // without memory for the handler a child goes on with its parent's entries
  static std::vector<std::unique_ptr<Recorder>>& kept = *new std::vector<std::unique_ptr<Recorder>>();
  kept.push_back(std::make_unique<Recorder>(wanted()));
  process_recorder.store(kept.back().get(), std::memory_order_release);
  return *kept.back();
}

void Recorder::configure(const RecorderOptions& options) {
  const std::lock_guard lock(making);
  wanted() = options;
}

void Recorder::add_group(std::shared_ptr<const RecordedGroup> group) {
  const std::lock_guard lock(mutex_);
  const auto known = std::find_if(groups_.begin(), groups_.end(),
                                  [&](const auto& other) { return other->name == group->name; });
  if (known != groups_.end()) {
    *known = std::move(group);  // a later group of the same name follows a destroyed one
  } else {
    groups_.push_back(std::move(group));
  }
}

uint64_t Recorder::begin(const std::shared_ptr<const RecordedGroup>& group, const RecordedCall& call,
                         std::vector<Frame> frames) {
  if (ring_.empty()) return 0;
  const std::lock_guard lock(mutex_);
  const uint64_t id = ++last_id_;
  Entry& entry = ring_[(id - 1) % ring_.size()];
  entry.id = id;
  entry.group = group;
  entry.call = call;
  entry.created_ns = now_ns();
  entry.started_ns = entry.completed_ns = 0;
  entry.thread = this_thread();
  entry.failure_kind.clear();
  entry.failure.clear();
  entry.frames = std::move(frames);
  return id;
}

Recorder::Entry* Recorder::find(uint64_t id) {
  if (id == 0 || ring_.empty()) return nullptr;
  Entry& entry = ring_[(id - 1) % ring_.size()];
  return entry.id == id ? &entry : nullptr;  // else it was overwritten meanwhile
}

void Recorder::started(uint64_t id) {
  const std::lock_guard lock(mutex_);
  if (Entry* entry = find(id)) entry->started_ns = now_ns();
}

void Recorder::completed(uint64_t id) {
  const std::lock_guard lock(mutex_);
  Entry* entry = find(id);
  if (entry == nullptr) return;
  entry->completed_ns = now_ns();
  if (entry->started_ns == 0) entry->started_ns = entry->completed_ns;
}

void Recorder::failed(uint64_t id, const char* kind, const std::string& text) {
  const std::lock_guard lock(mutex_);
  Entry* entry = find(id);
  if (entry == nullptr) return;
  entry->failure_kind = kind;
  entry->failure = text;
}

std::vector<Recorder::Entry> Recorder::entries() const {
  const std::lock_guard lock(mutex_);
  std::vector<Entry> copies;
  for (const Entry& entry : ring_) {
    if (entry.id != 0) copies.push_back(entry);
  }
  std::sort(copies.begin(), copies.end(), [](const Entry& a, const Entry& b) { return a.id < b.id; });
  return copies;
}

std::vector<std::shared_ptr<const RecordedGroup>> Recorder::groups() const {
  const std::lock_guard lock(mutex_);
  return groups_;
}

int Recorder::global_rank() const {
  const std::lock_guard lock(mutex_);
  const RecordedGroup* largest = nullptr;
  for (const auto& group : groups_) {
    if (largest == nullptr || group->global_ranks.size() > largest->global_ranks.size())
      largest = group.get();
  }
  return largest == nullptr ? -1 : largest->global_ranks[static_cast<size_t>(largest->rank)];
}

}  // namespace mlsys::comm
