#include "memory/arena.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "memory/limits.h"

namespace mlsys {
namespace {

constexpr size_t kMebibyte = size_t{1} << 20;

size_t configured_capacity() {
  const char* text = std::getenv("MLSYS_ARENA_MIB");
  if (text == nullptr || *text == '\0') return std::max(memory_limit() / kMebibyte * kMebibyte, kMebibyte);
  char* end = nullptr;
  const unsigned long long mebibytes = std::strtoull(text, &end, 10);
  if (*end != '\0' || mebibytes == 0 || mebibytes > (size_t{1} << 40) / kMebibyte * 1024) {
    throw std::invalid_argument("MLSYS_ARENA_MIB=" + std::string(text) +
                                " is no size. Expected a whole number of MiB, 1 or more.");
  }
  return mebibytes * kMebibyte;
}

size_t rounded_up(size_t bytes) {
  return (std::max<size_t>(bytes, 1) + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
}

}  // namespace

std::shared_ptr<Arena> Arena::of_process() {
  // The one process-wide object of the engine: all groups of a process share it, so that a tensor allocated
  // through one group needs no staging in another.
  static std::mutex mutex;
  static std::weak_ptr<Arena> current;
  const std::lock_guard lock(mutex);
  std::shared_ptr<Arena> arena = current.lock();
  if (arena == nullptr || !arena->is_own()) {
    arena = std::make_shared<Arena>(configured_capacity());
    current = arena;
  }
  return arena;
}

Arena::Arena(size_t capacity_bytes)
    : fd_(make_memfd("mlsys-arena", capacity_bytes)),
      mapping_(fd_.get(), capacity_bytes),
      owner_(::getpid()) {
  free_[0] = capacity_bytes;
  mapping_.advise_huge_pages();
}

std::shared_ptr<void> Arena::allocate(size_t bytes) {
  if (bytes > capacity()) bytes = capacity() + 1;  // keeps the rounding below from overflowing
  const size_t rounded = rounded_up(bytes);
  size_t dirty = 0;
  const size_t offset = take(rounded, &dirty);
  std::byte* data = base() + offset;
  std::shared_ptr<void> handle(
      data, [arena = shared_from_this(), offset, rounded](void*) { arena->give_back(offset, rounded); });
  std::memset(data, 0, dirty);
  return handle;
}

size_t Arena::take(size_t bytes, size_t* dirty_bytes) {
  const std::lock_guard lock(mutex_);
  const auto block =
      std::find_if(free_.begin(), free_.end(), [&](const auto& b) { return b.second >= bytes; });
  if (block == free_.end()) {
    size_t largest = 0;
    for (const auto& [offset, size] : free_) largest = std::max(largest, size);
    throw ArenaFull("the shared arena cannot hold " + std::to_string(bytes) +
                    " more bytes: " + std::to_string(in_use_) + " of " + std::to_string(capacity()) +
                    " are in use and the largest free block has " + std::to_string(largest) +
                    ". Free tensors, or raise MLSYS_ARENA_MIB.");
  }
  const auto [offset, size] = *block;
  free_.erase(block);
  if (size > bytes) free_[offset + bytes] = size - bytes;
  *dirty_bytes = offset < touched_ ? std::min(bytes, touched_ - offset) : 0;
  touched_ = std::max(touched_, offset + bytes);
  in_use_ += bytes;
  return offset;
}

void Arena::give_back(size_t offset, size_t bytes) {
  const std::lock_guard lock(mutex_);
  in_use_ -= bytes;
  auto block = free_.emplace(offset, bytes).first;
  const auto next = std::next(block);
  if (next != free_.end() && block->first + block->second == next->first) {
    block->second += next->second;
    free_.erase(next);
  }
  if (block != free_.begin()) {
    const auto previous = std::prev(block);
    if (previous->first + previous->second == block->first) {
      previous->second += block->second;
      free_.erase(block);
    }
  }
}

bool Arena::is_own() const { return owner_ == ::getpid(); }

uint64_t Arena::offset_of(const void* data, size_t bytes) const {
  const auto address = reinterpret_cast<uintptr_t>(data);
  const auto start = reinterpret_cast<uintptr_t>(base());
  if (address < start || bytes > capacity() || address - start > capacity() - bytes) return kNoOffset;
  return address - start;
}

size_t Arena::bytes_in_use() const {
  const std::lock_guard lock(mutex_);
  return in_use_;
}

}  // namespace mlsys
