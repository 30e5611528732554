// Sockets: TCP and abstract unix addresses, non-blocking, closed on exec and not kept by forked children.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "comm/transport/fork_guard.h"
#include "memory/posix.h"

namespace mlsys::comm {

// A connected or listening socket; closing it also ends its guard against forked children.
class Socket {
 public:
  Socket() = default;
  explicit Socket(UniqueFd fd);
  Socket(Socket&&) noexcept = default;
  Socket& operator=(Socket&& other) noexcept;
  ~Socket() { close(); }

  int fd() const { return fd_.get(); }
  explicit operator bool() const { return static_cast<bool>(fd_); }
  void close();

 private:
  UniqueFd fd_;
};

// Where a rank's TCP sockets listen, as text: a numeric IPv4 or IPv6 address.
struct TcpAddress {
  std::string host;
  uint16_t port = 0;
};

// MLSYS_ADDRESS, or the address of MLSYS_INTERFACE, or of the interface that routes to MASTER_ADDR; loopback
// when `one_host`.
std::string choose_address(bool one_host);

UniqueFd listen_tcp(const std::string& host, uint16_t* port);
UniqueFd listen_unix(const std::string& abstract_name);
// Starts connecting; the result of a TCP connect shows in SO_ERROR once writable. A unix connect completes or
// fails here, never waiting: an empty UniqueFd means that nobody of that name can be reached, or with `*busy`
// that its backlog is full for now.
UniqueFd connect_tcp(const TcpAddress& address);
UniqueFd connect_unix(const std::string& abstract_name, bool* busy);
// Empty when nobody is waiting (or the caller has already gone), or with `*short_of_descriptors` when this
// process has no descriptor left for who waits.
UniqueFd accept_nonblocking(int listening, bool* short_of_descriptors);
// No delay, keep-alive and user timeout, so that a host that vanished is noticed.
void tune_tcp(int fd);

// Passes descriptors together with one byte / receives exactly `count` of them. Receiving waits until
// `check`, which is called again and again meanwhile, throws.
void send_descriptors(int socket, std::span<const int> descriptors);
std::vector<UniqueFd> receive_descriptors(int socket, size_t count, const std::function<void()>& check);

}  // namespace mlsys::comm
