#include "comm/transport/fork_guard.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <mutex>
#include <set>
#include <system_error>

namespace mlsys::comm {
namespace {

// A process-wide table is unavoidable here: fork handlers take no argument.
struct Guarded {
  std::mutex mutex;
  std::set<int> descriptors;
};

Guarded& guarded() {
  static Guarded* table = new Guarded;  // never destroyed: a fork may happen during exit
  return *table;
}

void before_fork() { guarded().mutex.lock(); }
void in_parent() { guarded().mutex.unlock(); }
void in_child() {
  // Only async-signal-safe calls; a failure leaves the inherited descriptor as it was.
  const int null = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  if (null >= 0) {
    for (int fd : guarded().descriptors) (void)::dup3(null, fd, O_CLOEXEC);
    (void)::close(null);
  }
  guarded().mutex.unlock();
}

}  // namespace

void guard_from_children(int fd) {
  static std::once_flag once;
  std::call_once(once, [] {
    const int error = ::pthread_atfork(before_fork, in_parent, in_child);
    if (error != 0) throw std::system_error(error, std::generic_category(), "pthread_atfork");
  });
  const std::lock_guard lock(guarded().mutex);
  guarded().descriptors.insert(fd);
}

void stop_guarding(int fd) {
  const std::lock_guard lock(guarded().mutex);
  guarded().descriptors.erase(fd);
}

}  // namespace mlsys::comm
