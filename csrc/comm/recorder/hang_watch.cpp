#include "comm/recorder/hang_watch.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <thread>

#include "comm/recorder/dump.h"
#include "memory/posix.h"

namespace mlsys::comm {
namespace {

using std::chrono::steady_clock;
constexpr std::chrono::milliseconds kOneFailure{1000};  // dumps closer together than this tell the same story

std::atomic<int> signal_fd{-1};
std::atomic<pid_t> watched_by{0};
std::mutex dumping;
steady_clock::time_point last_dump, last_failure;  // guarded by dumping
enum class Why { kFailure, kAsked, kOther };

void on_signal(int) {
  const int saved = errno;
  const uint64_t one = 1;
  (void)!::write(signal_fd.load(std::memory_order_relaxed), &one, sizeof(one));
  errno = saved;
}

bool is_recent(steady_clock::time_point dumped) {
  return dumped != steady_clock::time_point() && steady_clock::now() - dumped < kOneFailure;
}

// A failure's dump replaces one that another rank's dump caused, not the other way round, and answers to
// answers end the round.
void dump(Recorder& recorder, const std::string& reason, Why why) noexcept {
  try {
    const std::lock_guard lock(dumping);
    if (why == Why::kFailure ? is_recent(last_failure) : why == Why::kOther && is_recent(last_dump)) return;
    (void)write_dump(recorder, recorder.options().hang_dir, recorder.global_rank(), reason);
    last_dump = steady_clock::now();
    if (why == Why::kFailure) last_failure = last_dump;
  } catch (const std::exception&) {
    // The folder cannot be written: the failure itself is still told by its exception.
  }
}

// True when another rank's dump is among the events.
bool another_dumped(int fd, const std::string& own_name) {
  alignas(inotify_event) char buffer[4096];
  bool found = false;
  for (ssize_t length; (length = ::read(fd, buffer, sizeof(buffer))) > 0;) {
    for (ssize_t at = 0; at < length;) {
      const auto* event = reinterpret_cast<const inotify_event*>(buffer + at);
      const std::string name = event->len > 0 ? event->name : "";
      found |= name.starts_with(kDumpPrefix) && name != own_name;
      at += static_cast<ssize_t>(sizeof(inotify_event)) + event->len;
    }
  }
  return found;
}

void watch(Recorder& recorder, UniqueFd asked, UniqueFd folder) {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  pthread_setname_np(pthread_self(), "mlsys-hang");
  for (;;) {
    std::array<pollfd, 2> waiting{pollfd{asked.get(), POLLIN, 0}, pollfd{folder.get(), POLLIN, 0}};
    if (::poll(waiting.data(), waiting.size(), -1) < 0) {
      if (errno == EINTR) continue;
      return;
    }
    const std::string own = kDumpPrefix + std::to_string(recorder.global_rank());
    if (waiting[1].revents != 0 && another_dumped(folder.get(), own)) {
      dump(recorder, "another rank dumped", Why::kOther);
    }
    uint64_t count = 0;
    if (waiting[0].revents != 0 && ::read(asked.get(), &count, sizeof(count)) > 0) {
      dump(recorder, "SIGUSR2", Why::kAsked);
    }
  }
}

void handle_signal() {
  struct sigaction current{};
  if (::sigaction(SIGUSR2, nullptr, &current) != 0 || current.sa_handler != SIG_DFL) return;
  struct sigaction handler{};
  handler.sa_handler = on_signal;
  handler.sa_flags = SA_RESTART;
  ::sigaction(SIGUSR2, &handler, nullptr);
}

}  // namespace

void start_hang_watch(Recorder& recorder) {
  if (recorder.options().hang_dir.empty()) return;
  const pid_t self = ::getpid();
  if (watched_by.exchange(self) == self) return;
  std::filesystem::create_directories(recorder.options().hang_dir);
  UniqueFd asked(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!asked) throw_errno("eventfd of the hang watch");
  UniqueFd folder(::inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
  if (!folder) throw_errno("inotify of the hang watch");
  if (::inotify_add_watch(folder.get(), recorder.options().hang_dir.c_str(), IN_MOVED_TO) < 0) {
    throw_errno("watching the hang folder");
  }
  signal_fd.store(asked.get());
  handle_signal();
  // Detached: it waits for ever, uses only what is never destroyed, and ends with the process.
  std::thread(watch, std::ref(recorder), std::move(asked), std::move(folder)).detach();
}

void dump_failure(Recorder& recorder, const std::string& reason) noexcept {
  if (!recorder.options().hang_dir.empty()) dump(recorder, reason, Why::kFailure);
}

}  // namespace mlsys::comm
