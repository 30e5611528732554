#include "comm/p2p/message.h"

#include <cstring>
#include <utility>

namespace mlsys::comm {
namespace {

constexpr uint32_t kMagic = 0x4d534c4d;  // "MLSM"

}  // namespace

std::array<uint8_t, MessageHeader::kBytes> encode(const MessageHeader& header) {
  std::array<uint8_t, MessageHeader::kBytes> bytes{};
  std::memcpy(&bytes[0], &kMagic, sizeof(kMagic));
  std::memcpy(&bytes[8], &header.tag, sizeof(header.tag));
  std::memcpy(&bytes[16], &header.bytes, sizeof(header.bytes));
  return bytes;
}

std::optional<MessageHeader> decode_message_header(std::span<const uint8_t> bytes) {
  if (bytes.size() != MessageHeader::kBytes) return std::nullopt;
  uint32_t magic = 0, reserved = 0;
  MessageHeader header;
  std::memcpy(&magic, &bytes[0], sizeof(magic));
  std::memcpy(&reserved, &bytes[4], sizeof(reserved));
  std::memcpy(&header.tag, &bytes[8], sizeof(header.tag));
  std::memcpy(&header.bytes, &bytes[16], sizeof(header.bytes));
  if (magic != kMagic || reserved != 0 || header.bytes > MessageHeader::kMostBytes) return std::nullopt;
  return header;
}

void MessageState::complete(int source, std::exception_ptr error) {
  std::function<void()> callback;
  {
    const std::lock_guard lock(mutex_);
    if (done_) return;
    done_ = true;
    source_ = source;
    error_ = std::move(error);
    callback = std::exchange(callback_, nullptr);
  }
  changed_.notify_all();
  if (callback) callback();
}

bool MessageState::completed() const {
  const std::lock_guard lock(mutex_);
  return done_;
}

int MessageState::source() const {
  const std::lock_guard lock(mutex_);
  return source_;
}

void MessageState::on_completion(std::function<void()> callback) {
  {
    const std::lock_guard lock(mutex_);
    if (!done_) {
      callback_ = std::move(callback);
      return;
    }
  }
  callback();
}

bool MessageState::wait_until(std::chrono::steady_clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  if (!changed_.wait_until(lock, deadline, [this] { return done_; })) return false;
  if (error_) std::rethrow_exception(error_);
  return true;
}

}  // namespace mlsys::comm
