#include "comm/fault/control_frame.h"

#include <algorithm>
#include <cstring>

namespace mlsys::comm {
namespace {

constexpr uint32_t kMagic = 0x46534c4d;  // "MLSF"

// Offsets of the fixed layout.
constexpr size_t kTypeAt = 4, kLeftAt = 8, kKindAt = 12, kRankAt = 16, kPidAt = 24, kSequenceAt = 32,
                 kHostAt = 40, kOpAt = kHostAt + 128, kCauseAt = kOpAt + 128;
static_assert(kCauseAt + PoisonRecord::kCauseBytes <= ControlFrame::kBytes);

template <class T>
void put(uint8_t* target, T value) {
  std::memcpy(target, &value, sizeof(value));
}
template <class T>
T read_as(const uint8_t* source) {
  T value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

void put_text(uint8_t* target, size_t room, const std::string& text) {
  std::memcpy(target, text.data(), std::min(text.size(), room - 1));
}
std::string text_at(const uint8_t* source, size_t room) {
  const auto* text = reinterpret_cast<const char*>(source);
  return std::string(text, ::strnlen(text, room - 1));
}

}  // namespace

std::array<uint8_t, ControlFrame::kBytes> encode(const ControlFrame& frame) {
  std::array<uint8_t, ControlFrame::kBytes> bytes{};
  put(&bytes[0], kMagic);
  put(&bytes[kTypeAt], frame.type);
  put(&bytes[kLeftAt], frame.left_rank);
  put(&bytes[kKindAt], frame.poison.kind);
  put(&bytes[kRankAt], static_cast<int32_t>(frame.poison.rank));
  put(&bytes[kPidAt], frame.poison.pid);
  put(&bytes[kSequenceAt], frame.poison.sequence);
  put_text(&bytes[kHostAt], 128, frame.poison.host);
  put_text(&bytes[kOpAt], 128, frame.poison.op);
  put_text(&bytes[kCauseAt], PoisonRecord::kCauseBytes, frame.poison.cause);
  return bytes;
}

std::optional<ControlFrame> decode_control_frame(std::span<const uint8_t> bytes, int world_size) {
  if (bytes.size() != ControlFrame::kBytes || read_as<uint32_t>(&bytes[0]) != kMagic) return std::nullopt;
  ControlFrame frame;
  frame.type = read_as<ControlFrame::Type>(&bytes[kTypeAt]);
  frame.left_rank = read_as<int32_t>(&bytes[kLeftAt]);
  if (frame.type == ControlFrame::Type::kLeft) {
    if (frame.left_rank < 0 || frame.left_rank >= world_size) return std::nullopt;
    return frame;
  }
  if (frame.type != ControlFrame::Type::kPoison) return std::nullopt;
  frame.poison.kind = read_as<PoisonKind>(&bytes[kKindAt]);
  if (frame.poison.kind != PoisonKind::kPeerFailed && frame.poison.kind != PoisonKind::kMismatch) {
    return std::nullopt;
  }
  frame.poison.rank = read_as<int32_t>(&bytes[kRankAt]);
  if (frame.poison.rank < -1) return std::nullopt;
  frame.poison.pid = read_as<int64_t>(&bytes[kPidAt]);
  frame.poison.sequence = read_as<uint64_t>(&bytes[kSequenceAt]);
  frame.poison.host = text_at(&bytes[kHostAt], 128);
  frame.poison.op = text_at(&bytes[kOpAt], 128);
  frame.poison.cause = text_at(&bytes[kCauseAt], PoisonRecord::kCauseBytes);
  return frame;
}

}  // namespace mlsys::comm
