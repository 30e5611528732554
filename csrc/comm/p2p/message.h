// The frames of point-to-point messages, and the state of one send or receive.
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

// Every frame of a message connection, either way, is a header; after kEager and kPayload the bytes follow.
//
//   sender   -> kEager    a small message
//   sender   -> kOffer    a large one waits here under `id`
//   receiver -> kPull     somebody has asked for it
//   sender   -> kPayload  here it is, from another host
//            or kInArena, kInMemory   its place in this process: fetch it (the same host)
//   receiver -> kRefuse   this process may not read there; kPayload follows
//   receiver -> kTaken    it has been fetched, or is not wanted: the send is complete
struct MessageHeader {
  static constexpr size_t kBytes = 40;
  static constexpr size_t kMostEager = 64 << 10;
  static constexpr uint64_t kMostBytes = uint64_t{1} << 46;
  enum class Kind : uint32_t { kEager = 1, kOffer, kPull, kPayload, kInArena, kInMemory, kRefuse, kTaken };

  Kind kind = Kind::kEager;
  uint64_t tag = 0;
  uint64_t bytes = 0;
  uint64_t id = 0;     // of an offered message, counted by its sender for each receiver
  uint64_t place = 0;  // an offset in the sender's arena, or an address in its process
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
  bool lent = false;             // the receiver's process may be reading `data`
  std::vector<std::byte> owned;  // the payload of an abandoned send

  // Ends it, well or with an error, and runs the callback. Call without the messenger's mutex.
  void complete(int source, std::exception_ptr error);
  bool completed() const;
  int source() const;
  void before_completion(std::function<void(bool succeeded)> callback);
  void on_completion(std::function<void()> callback);
  // False when the time is over first. Throws the error it ended with.
  bool wait_until(std::chrono::steady_clock::time_point deadline);
  // The same, but tells nothing of the error.
  bool wait_quietly(std::chrono::milliseconds limit);

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool ending_ = false;  // somebody is in complete()
  bool done_ = false;
  int source_ = -1;
  std::exception_ptr error_;
  std::function<void(bool)> before_;
  std::function<void()> callback_;
};

}  // namespace mlsys::comm
