// Passing file descriptors over a unix socket (man 7 unix, SCM_RIGHTS).
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "comm/transport/socket.h"

namespace mlsys::comm {
namespace {

constexpr size_t kMostDescriptors = 16;
constexpr int kSendPatienceMs = 10000;  // the peer's buffer is empty: only a frozen kernel needs so long
constexpr int kLookMs = 20;

}  // namespace

void send_descriptors(int socket, std::span<const int> descriptors) {
  if (descriptors.empty() || descriptors.size() > kMostDescriptors) {
    throw std::invalid_argument("cannot pass " + std::to_string(descriptors.size()) + " descriptors at once");
  }
  alignas(cmsghdr) char control[CMSG_SPACE(kMostDescriptors * sizeof(int))] = {};
  char byte = 'd';
  iovec payload{&byte, 1};
  msghdr message{};
  message.msg_iov = &payload;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = CMSG_SPACE(descriptors.size_bytes());
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(descriptors.size_bytes());
  std::memcpy(CMSG_DATA(header), descriptors.data(), descriptors.size_bytes());
  for (;;) {
    if (::sendmsg(socket, &message, MSG_NOSIGNAL) == 1) return;
    if (errno == EAGAIN) {
      pollfd waiting{socket, POLLOUT, 0};
      if (::poll(&waiting, 1, kSendPatienceMs) > 0) continue;
    }
    if (errno != EINTR) throw_errno("sendmsg with descriptors");
  }
}

std::vector<UniqueFd> receive_descriptors(int socket, size_t count, const std::function<void()>& check) {
  alignas(cmsghdr) char control[CMSG_SPACE(kMostDescriptors * sizeof(int))];
  char byte = 0;
  iovec payload{&byte, 1};
  msghdr message{};
  message.msg_iov = &payload;
  message.msg_iovlen = 1;
  ssize_t got;
  for (;;) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    got = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
    if (got >= 0) break;
    if (errno == EAGAIN) {
      check();
      pollfd waiting{socket, POLLIN, 0};
      if (::poll(&waiting, 1, kLookMs) < 0 && errno != EINTR) throw_errno("poll for descriptors");
      continue;
    }
    if (errno != EINTR) throw_errno("recvmsg with descriptors");
  }
  std::vector<UniqueFd> descriptors;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t received = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < received; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof(fd));
      descriptors.emplace_back(fd);
    }
  }
  if (got != 1 || descriptors.size() != count || (message.msg_flags & MSG_CTRUNC) != 0) {
    throw std::runtime_error("expected " + std::to_string(count) + " descriptors from a local peer, got " +
                             std::to_string(descriptors.size()));
  }
  return descriptors;
}

}  // namespace mlsys::comm
