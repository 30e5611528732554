// What moves bytes between ranks of different hosts: our own TCP sockets, or a transport that the binding
// brought along.
#pragma once

#include <poll.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mlsys::comm {

// A contiguous part of a message. Pieces between two ranks with the same lane keep their order.
struct Piece {
  int peer = -1;
  int lane = 0;
  std::byte* data = nullptr;  // only read when sending; null in a receive drops what comes
  size_t bytes = 0;
  uint32_t message = 0;  // what reports completion: see Mesh
};

// Thrown by a carrier that cannot reach a peer any more.
struct Unreachable {
  int peer;
  std::string cause;
};

class Carrier {
 public:
  virtual ~Carrier() = default;

  // Queues; the memory stays valid until the piece is reported, or the carrier is closed.
  virtual void post_send(const Piece& piece) = 0;
  virtual void post_receive(const Piece& piece) = 0;
  // Moves what can be moved now, and appends the messages of the pieces that completed. True when any byte
  // moved. Throws Unreachable.
  virtual bool progress(std::vector<uint32_t>& completed) = 0;
  // What to poll for, so as to sleep until progress() has something to do.
  virtual void append_polls(std::vector<pollfd>& polls) const = 0;
  // How long a sleep may last at most, in ms: short where completion shows in no descriptor.
  virtual int longest_sleep_ms() const = 0;
  // The ranks that something still has to come from or go to.
  virtual std::vector<int> awaited() const = 0;
  // Gives up what is queued from (`incoming`) or to `peer`, which is gone: it is not reported, and its memory
  // may be freed.
  virtual void abandon(int peer, bool incoming) = 0;
  // The same for everything.
  virtual void close() = 0;

  virtual const char* name() const = 0;  // for messages: "TCP"
  virtual uint64_t bytes_sent() const = 0;
  virtual uint64_t bytes_received() const = 0;
};

}  // namespace mlsys::comm
