// How much memory this process may hope to use.
#pragma once

#include <cstddef>
#include <filesystem>

namespace mlsys {

// The smallest of the machine's memory and the limits of the control groups this process runs in, in bytes.
size_t memory_limit();

// The smallest memory limit among the control groups listed in `membership` (the format of
// /proc/self/cgroup, versions 1 and 2) and the groups around them, whose folders are below `mount`
// (/sys/fs/cgroup). The largest size_t when there is none.
size_t control_group_limit(const std::filesystem::path& membership, const std::filesystem::path& mount);

}  // namespace mlsys
