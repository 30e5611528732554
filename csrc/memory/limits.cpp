#include "memory/limits.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

namespace mlsys {
namespace {

// Control groups version 2 say "max" when there is no limit; version 1 says a number beyond any memory.
size_t limit_in(const char* path) {
  std::ifstream file(path);
  size_t bytes = 0;
  if (file >> bytes && bytes > 0) return bytes;
  return std::numeric_limits<size_t>::max();
}

}  // namespace

size_t memory_limit() {
  const long pages = ::sysconf(_SC_PHYS_PAGES);
  const long page_bytes = ::sysconf(_SC_PAGESIZE);
  size_t limit = std::numeric_limits<size_t>::max() / 4;
  if (pages > 0 && page_bytes > 0) limit = static_cast<size_t>(pages) * static_cast<size_t>(page_bytes);
  limit = std::min(limit, limit_in("/sys/fs/cgroup/memory.max"));
  return std::min(limit, limit_in("/sys/fs/cgroup/memory/memory.limit_in_bytes"));
}

}  // namespace mlsys
