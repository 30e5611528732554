#include "memory/limits.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

namespace mlsys {
namespace {

// Control groups version 2 say "max" when there is no limit; version 1 says a number beyond any memory.
size_t limit_in(const std::filesystem::path& path) {
  std::ifstream file(path);
  size_t bytes = 0;
  if (file >> bytes && bytes > 0) return bytes;
  return std::numeric_limits<size_t>::max();
}

// Limits of a group and of all around it, up to the mount. In a container the listed group may be named as
// the host sees it, and only the mount itself exists: what is missing has no limit.
size_t limit_along(const std::filesystem::path& mount, const std::string& group, const char* file) {
  size_t limit = limit_in(mount / file);
  std::filesystem::path folder = mount;
  for (const auto& part : std::filesystem::path(group).relative_path()) {
    folder /= part;
    limit = std::min(limit, limit_in(folder / file));
  }
  return limit;
}

}  // namespace

size_t control_group_limit(const std::filesystem::path& membership, const std::filesystem::path& mount) {
  size_t limit = std::min(limit_along(mount, "", "memory.max"),
                          limit_along(mount / "memory", "", "memory.limit_in_bytes"));
  std::ifstream file(membership);
  // A line is "number:controllers:group"; version 2 has number 0 and no controllers.
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string group = line.substr(second + 1);
    if (controllers == ",,") limit = std::min(limit, limit_along(mount, group, "memory.max"));
    if (controllers.find(",memory,") != std::string::npos) {
      limit = std::min(limit, limit_along(mount / "memory", group, "memory.limit_in_bytes"));
    }
  }
  return limit;
}

size_t memory_limit() {
  const long pages = ::sysconf(_SC_PHYS_PAGES);
  const long page_bytes = ::sysconf(_SC_PAGESIZE);
  size_t limit = std::numeric_limits<size_t>::max() / 4;
  if (pages > 0 && page_bytes > 0) limit = static_cast<size_t>(pages) * static_cast<size_t>(page_bytes);
  return std::min(limit, control_group_limit("/proc/self/cgroup", "/sys/fs/cgroup"));
}

}  // namespace mlsys
