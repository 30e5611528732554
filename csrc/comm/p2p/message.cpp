#include "comm/p2p/message.h"

#include <utility>

#include "comm/wire.h"

namespace mlsys::comm {
namespace {

constexpr uint32_t kMagic = 0x4d534c4d;  // "MLSM"

}  // namespace

std::array<uint8_t, MessageHeader::kBytes> encode(const MessageHeader& header) {
  std::array<uint8_t, MessageHeader::kBytes> bytes{};
  put(&bytes[0], kMagic);
  put(&bytes[4], header.kind);
  put(&bytes[8], header.tag);
  put(&bytes[16], header.bytes);
  put(&bytes[24], header.id);
  put(&bytes[32], header.place);
  return bytes;
}

std::optional<MessageHeader> decode_message_header(std::span<const uint8_t> bytes) {
  if (bytes.size() != MessageHeader::kBytes || read_as<uint32_t>(&bytes[0]) != kMagic) return std::nullopt;
  const MessageHeader header{read_as<MessageHeader::Kind>(&bytes[4]), read_as<uint64_t>(&bytes[8]),
                             read_as<uint64_t>(&bytes[16]), read_as<uint64_t>(&bytes[24]),
                             read_as<uint64_t>(&bytes[32])};
  const bool known = header.kind >= MessageHeader::Kind::kEager && header.kind <= MessageHeader::Kind::kTaken;
  const uint64_t most =
      header.kind == MessageHeader::Kind::kEager ? MessageHeader::kMostEager : MessageHeader::kMostBytes;
  return known && header.bytes <= most ? std::optional(header) : std::nullopt;
}

void MessageState::complete(int source, std::exception_ptr error) {
  std::function<void(bool)> before;
  std::function<void()> callback;
  {
    const std::lock_guard lock(mutex_);
    if (ending_) return;
    ending_ = true;
    before = std::exchange(before_, nullptr);
  }
  if (before) before(error == nullptr);
  {
    const std::lock_guard lock(mutex_);
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

void MessageState::before_completion(std::function<void(bool)> callback) {
  bool succeeded;
  {
    std::unique_lock lock(mutex_);
    if (!ending_) {
      before_ = std::move(callback);
      return;
    }
    changed_.wait(lock, [this] { return done_; });
    succeeded = error_ == nullptr;
  }
  callback(succeeded);
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

bool MessageState::wait_quietly(std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, limit, [this] { return done_; });
}

}  // namespace mlsys::comm
