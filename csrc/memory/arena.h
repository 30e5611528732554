// Shared memory that other processes of this host can map: one sparse memfd with an allocator inside.
//
// Memory is named by (arena, offset), which is the same in every process; addresses are not. A peer that
// received the file descriptor maps the whole arena once and reaches every block, also those allocated later.
// Blocks are aligned to 64 bytes and zero-filled. Freed blocks are kept and reused first-fit in address
// order, so a caller that allocates and frees the same sizes settles on the same pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>

#include "memory/posix.h"

namespace mlsys {

// Thrown when the arena is full; what() has the numbers and the way out.
class ArenaFull : public std::bad_alloc {
 public:
  explicit ArenaFull(std::string message)
      : message_(std::make_shared<const std::string>(std::move(message))) {}
  const char* what() const noexcept override { return message_->c_str(); }

 private:
  std::shared_ptr<const std::string> message_;  // copying an exception must not throw
};

class Arena : public std::enable_shared_from_this<Arena> {
 public:
  static constexpr size_t kAlignment = 64;
  static constexpr uint64_t kNoOffset = ~uint64_t{0};

  // The arena of this process, made on first use and gone when its last user is; a forked child gets its own.
  // Its size is memory_limit(), or MLSYS_ARENA_MIB when that is set.
  static std::shared_ptr<Arena> of_process();

  explicit Arena(size_t capacity_bytes);
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // The handle keeps the arena alive. Throws ArenaFull.
  std::shared_ptr<void> allocate(size_t bytes);

  // Offset of [data, data + bytes) when all of it lies inside, else kNoOffset.
  uint64_t offset_of(const void* data, size_t bytes) const;

  // False in a child forked from the process that made it.
  bool is_own() const;
  int fd() const { return fd_.get(); }
  std::byte* base() const { return mapping_.data(); }
  size_t capacity() const { return mapping_.bytes(); }
  size_t bytes_in_use() const;

 private:
  size_t take(size_t bytes, size_t* dirty_bytes);
  void give_back(size_t offset, size_t bytes);

  UniqueFd fd_;
  Mapping mapping_;
  mutable std::mutex mutex_;
  std::map<size_t, size_t> free_;  // offset -> bytes; neighbours are merged
  size_t touched_ = 0;             // everything from here on was never handed out and is still zero
  size_t in_use_ = 0;
  const int owner_;
};

}  // namespace mlsys
