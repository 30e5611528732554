#include "memory/posix.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace mlsys {

void throw_errno(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

void UniqueFd::reset() {
  // On Linux the descriptor is gone even when close() reports EINTR or EIO, so there is nothing to retry.
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

UniqueFd make_memfd(const char* label, size_t bytes) {
  UniqueFd fd(::memfd_create(label, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) throw_errno(std::string("memfd_create(") + label + ")");
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) {
    throw_errno("ftruncate of shared memory to " + std::to_string(bytes) + " bytes");
  }
  return fd;
}

Mapping::Mapping(int fd, size_t bytes) : bytes_(bytes) {
  void* base = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (base == MAP_FAILED) throw_errno("mmap of " + std::to_string(bytes) + " bytes of shared memory");
  base_ = static_cast<std::byte*>(base);
}

Mapping::~Mapping() {
  if (base_ != nullptr) ::munmap(base_, bytes_);
}

void Mapping::advise_huge_pages() const { (void)::madvise(base_, bytes_, MADV_HUGEPAGE); }

size_t file_bytes(int fd) {
  struct stat status{};
  if (::fstat(fd, &status) != 0) throw_errno("fstat of a received descriptor");
  return static_cast<size_t>(status.st_size);
}

}  // namespace mlsys
