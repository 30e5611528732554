#include "comm/transport/socket.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <system_error>

namespace mlsys::comm {
namespace {

constexpr int kBacklog = 512;

struct Address {
  sockaddr_storage storage{};
  socklen_t length = 0;
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};

Address resolve(const std::string& host, uint16_t port, int flags) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  addrinfo* raw = nullptr;
  const int error = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &raw);
  if (error != 0) {
    throw std::runtime_error("cannot resolve address \"" + host + "\": " + ::gai_strerror(error));
  }
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> found(raw, ::freeaddrinfo);
  Address address;
  std::memcpy(&address.storage, found->ai_addr, found->ai_addrlen);
  address.length = found->ai_addrlen;
  return address;
}

std::string text_of(const sockaddr* address, socklen_t length) {
  char host[NI_MAXHOST];
  const int error = ::getnameinfo(address, length, host, sizeof(host), nullptr, 0, NI_NUMERICHOST);
  if (error != 0) throw std::runtime_error(std::string("getnameinfo: ") + ::gai_strerror(error));
  return host;
}

socklen_t length_of(const sockaddr* address) {
  return address->sa_family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in);
}

// The first usable address of `interface`, or of any interface that is not loopback when it is empty.
std::string interface_address(const std::string& interface) {
  ifaddrs* raw = nullptr;
  if (::getifaddrs(&raw) != 0) throw_errno("getifaddrs");
  const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> list(raw, ::freeifaddrs);
  for (const int family : {AF_INET, AF_INET6}) {
    for (const ifaddrs* entry = list.get(); entry != nullptr; entry = entry->ifa_next) {
      if (entry->ifa_addr == nullptr || entry->ifa_addr->sa_family != family) continue;
      const bool loopback = std::string(entry->ifa_name) == "lo";
      if (interface.empty() ? loopback : interface != entry->ifa_name) continue;
      return text_of(entry->ifa_addr, length_of(entry->ifa_addr));
    }
  }
  if (!interface.empty()) {
    throw std::invalid_argument("MLSYS_INTERFACE=" + interface +
                                " names no network interface with an address. `ip addr` lists them.");
  }
  return "127.0.0.1";
}

// Connecting a datagram socket sends nothing but makes the kernel choose the route.
std::string address_towards(const std::string& host) {
  const Address target = resolve(host, 9, 0);
  const UniqueFd fd(::socket(target.storage.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!fd) throw_errno("socket");
  if (::connect(fd.get(), target.get(), target.length) != 0) return "";
  Address mine;
  mine.length = sizeof(mine.storage);
  if (::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&mine.storage), &mine.length) != 0) {
    throw_errno("getsockname");
  }
  return text_of(mine.get(), mine.length);
}

sockaddr_un abstract_address(const std::string& name, socklen_t* length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (name.size() + 1 > sizeof(address.sun_path))
    throw std::invalid_argument("socket name too long: " + name);
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  *length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

UniqueFd stream_socket(int family) {
  UniqueFd fd(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) throw_errno("socket");
  return fd;
}

}  // namespace

Socket::Socket(UniqueFd fd) : fd_(std::move(fd)) {
  if (fd_) guard_from_children(fd_.get());
}

Socket& Socket::operator=(Socket&& other) noexcept {
  if (this != &other) {
    close();
    fd_ = std::move(other.fd_);
  }
  return *this;
}

void Socket::close() {
  if (fd_) stop_guarding(fd_.get());
  fd_.reset();
}

std::string choose_address(bool one_host) {
  const char* address = std::getenv("MLSYS_ADDRESS");
  if (address != nullptr && *address != '\0') return address;
  const char* interface = std::getenv("MLSYS_INTERFACE");
  if (interface != nullptr && *interface != '\0') return interface_address(interface);
  if (one_host) return "127.0.0.1";
  const char* master = std::getenv("MASTER_ADDR");
  if (master != nullptr && *master != '\0') {
    const std::string routed = address_towards(master);
    if (!routed.empty() && routed != "127.0.0.1" && routed != "::1") return routed;
  }
  return interface_address("");
}

UniqueFd listen_tcp(const std::string& host, uint16_t* port) {
  Address address = resolve(host, 0, AI_PASSIVE);
  UniqueFd fd = stream_socket(address.storage.ss_family);
  if (::bind(fd.get(), address.get(), address.length) != 0) throw_errno("bind to address " + host);
  if (::listen(fd.get(), kBacklog) != 0) throw_errno("listen on " + host);
  address.length = sizeof(address.storage);
  if (::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address.storage), &address.length) != 0) {
    throw_errno("getsockname");
  }
  *port = ntohs(address.storage.ss_family == AF_INET6
                    ? reinterpret_cast<const sockaddr_in6*>(&address.storage)->sin6_port
                    : reinterpret_cast<const sockaddr_in*>(&address.storage)->sin_port);
  return fd;
}

UniqueFd listen_unix(const std::string& abstract_name) {
  UniqueFd fd = stream_socket(AF_UNIX);
  socklen_t length = 0;
  const sockaddr_un address = abstract_address(abstract_name, &length);
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0) {
    throw_errno("bind to abstract socket " + abstract_name);
  }
  if (::listen(fd.get(), kBacklog) != 0) throw_errno("listen on abstract socket " + abstract_name);
  return fd;
}

UniqueFd connect_tcp(const TcpAddress& address) {
  const Address target = resolve(address.host, address.port, AI_NUMERICHOST);
  UniqueFd fd = stream_socket(target.storage.ss_family);
  tune_tcp(fd.get());
  if (::connect(fd.get(), target.get(), target.length) != 0 && errno != EINPROGRESS && errno != EINTR) {
    throw_errno("connect to " + address.host + " port " + std::to_string(address.port));
  }
  return fd;
}

UniqueFd connect_unix(const std::string& abstract_name, bool* busy) {
  *busy = false;
  UniqueFd fd = stream_socket(AF_UNIX);
  socklen_t length = 0;
  const sockaddr_un address = abstract_address(abstract_name, &length);
  int result;
  do {
    result = ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), length);
  } while (result != 0 && errno == EINTR);
  if (result == 0) return fd;
  *busy = errno == EAGAIN;
  if (*busy || errno == ECONNREFUSED || errno == ENOENT || errno == EPERM || errno == EACCES)
    return UniqueFd();
  throw_errno("connect to abstract socket " + abstract_name);
}

UniqueFd accept_nonblocking(int listening, bool* short_of_descriptors) {
  *short_of_descriptors = false;
  for (;;) {
    UniqueFd fd(::accept4(listening, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (fd) {
      try {
        tune_tcp(fd.get());
      } catch (const std::system_error&) {
        continue;  // the caller has already reset the connection
      }
      return fd;
    }
    if (errno == EAGAIN || errno == EWOULDBLOCK) return fd;
    // The caller hung up first, or there is a shortage that may pass: neither is a reason to stop serving.
    *short_of_descriptors = errno == EMFILE || errno == ENFILE;
    if (*short_of_descriptors || errno == ENOBUFS || errno == ENOMEM) return fd;
    if (errno == EINTR || errno == ECONNABORTED || errno == EPROTO || errno == EPERM) continue;
    throw_errno("accept");
  }
}

void tune_tcp(int fd) {
  int domain = 0;
  socklen_t length = sizeof(domain);
  if (::getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) != 0) throw_errno("getsockopt SO_DOMAIN");
  if (domain == AF_UNIX) return;
  const auto set = [fd](int level, int option, int value, const char* name) {
    if (::setsockopt(fd, level, option, &value, sizeof(value)) != 0) throw_errno(name);
  };
  set(IPPROTO_TCP, TCP_NODELAY, 1, "TCP_NODELAY");
  set(SOL_SOCKET, SO_KEEPALIVE, 1, "SO_KEEPALIVE");
  set(IPPROTO_TCP, TCP_KEEPIDLE, 5, "TCP_KEEPIDLE");
  set(IPPROTO_TCP, TCP_KEEPINTVL, 2, "TCP_KEEPINTVL");
  set(IPPROTO_TCP, TCP_KEEPCNT, 5, "TCP_KEEPCNT");
  set(IPPROTO_TCP, TCP_USER_TIMEOUT, 15000, "TCP_USER_TIMEOUT");
}

}  // namespace mlsys::comm
