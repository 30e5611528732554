// The frame of a point-to-point message, and the state of one send or receive.
#pragma once

#include <array>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace mlsys::comm {

// Goes before the payload on a connection.
struct MessageHeader {
  static constexpr size_t kBytes = 24;
  static constexpr uint64_t kMostBytes = uint64_t{1} << 46;

  uint64_t tag = 0;
  uint64_t bytes = 0;
};

std::array<uint8_t, MessageHeader::kBytes> encode(const MessageHeader& header);
// Nothing when the bytes are no header of a message of believable size.
std::optional<MessageHeader> decode_message_header(std::span<const uint8_t> bytes);

// One send or receive. The first block is guarded by the messenger's mutex, the second by the own one.
class MessageState {
 public:
  enum class Direction { kSend, kReceive };

  MessageState(Direction direction, std::byte* data, size_t bytes, int peer, uint64_t tag)
      : direction(direction), data(data), bytes(bytes), peer(peer), tag(tag) {}

  const Direction direction;
  std::byte* data;  // null once abandoned (receives)
  const size_t bytes;
  const int peer;  // destination or source, or Communicator::kAnySource
  const uint64_t tag;
  std::vector<std::byte> owned;  // the payload of an abandoned send

  // Ends it, well or with an error, and runs the callback. Call without the messenger's mutex.
  void complete(int source, std::exception_ptr error);
  bool completed() const;
  int source() const;
  void on_completion(std::function<void()> callback);
  // False when the time is over first. Throws the error it ended with.
  bool wait_until(std::chrono::steady_clock::time_point deadline);

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  int source_ = -1;
  std::exception_ptr error_;
  std::function<void()> callback_;
};

}  // namespace mlsys::comm
