// Sleeping on a 32-bit word of shared memory (man 2 futex).
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <ctime>

#include "memory/posix.h"

namespace mlsys::comm {

// Sleeps while `word` is `seen`, at most `longest`. May return early for no reason.
inline void futex_wait(const std::atomic<uint32_t>& word, uint32_t seen, std::chrono::milliseconds longest) {
  timespec limit{};
  limit.tv_sec = longest.count() / 1000;
  limit.tv_nsec = (longest.count() % 1000) * 1000000;
  if (::syscall(SYS_futex, &word, FUTEX_WAIT, seen, &limit, nullptr, 0) != 0 && errno != EAGAIN &&
      errno != EINTR && errno != ETIMEDOUT) {
    throw_errno("futex wait");
  }
}

inline void futex_wake_all(const std::atomic<uint32_t>& word) {
  if (::syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0) < 0) throw_errno("futex wake");
}

}  // namespace mlsys::comm
