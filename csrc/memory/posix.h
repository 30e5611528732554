// Owners of file descriptors and mappings, and system-call errors with values.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

namespace mlsys {

// Throws std::system_error for the current errno: "<what>: <message>".
[[noreturn]] void throw_errno(const std::string& what);

class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  ~UniqueFd() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }
  void reset();

 private:
  int fd_ = -1;
};

// An anonymous shared file of `bytes` zero bytes. Sparse: pages cost memory when they are first touched. It
// has no name in any file system, so nothing is left behind when the processes that hold it are killed.
UniqueFd make_memfd(const char* label, size_t bytes);

// A shared mapping of a whole file descriptor, unmapped on destruction.
class Mapping {
 public:
  Mapping() = default;
  Mapping(int fd, size_t bytes);
  Mapping(Mapping&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  // Asks for huge pages. Advice only: kernels without them for shared memory refuse, and nothing depends on
  // it.
  void advise_huge_pages() const;

  std::byte* data() const { return base_; }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* base_ = nullptr;
  size_t bytes_ = 0;
};

// Size of the file behind `fd`.
size_t file_bytes(int fd);

}  // namespace mlsys
