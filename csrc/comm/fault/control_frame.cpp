#include "comm/fault/control_frame.h"

#include "comm/wire.h"

namespace mlsys::comm {
namespace {

constexpr uint32_t kMagic = 0x46534c4d;  // "MLSF"

// Offsets of the fixed layout. The last field holds a poison's cause, a standing's descriptor or a notice.
constexpr size_t kTypeAt = 4, kRankAt = 8, kKindAt = 12, kCulpritAt = 16, kStateAt = 20, kPidAt = 24,
                 kSequenceAt = 32, kHostAt = 40, kOpAt = kHostAt + 128, kBodyAt = kOpAt + 128;
static_assert(kBodyAt + PoisonRecord::kCauseBytes <= ControlFrame::kBytes);
static_assert(ControlBlock::kNoticeBytes <= PoisonRecord::kCauseBytes);

bool decode_poison(std::span<const uint8_t> bytes, Poison* poison) {
  poison->kind = read_as<PoisonKind>(&bytes[kKindAt]);
  if (poison->kind < PoisonKind::kPeerFailed || poison->kind > PoisonKind::kTimedOut) return false;
  poison->rank = read_as<int32_t>(&bytes[kCulpritAt]);
  if (poison->rank < -1) return false;
  poison->pid = read_as<int64_t>(&bytes[kPidAt]);
  poison->sequence = read_as<uint64_t>(&bytes[kSequenceAt]);
  poison->host = text_at(&bytes[kHostAt], 128);
  poison->op = text_at(&bytes[kOpAt], 128);
  poison->cause = text_at(&bytes[kBodyAt], PoisonRecord::kCauseBytes);
  return true;
}

bool decode_standing(std::span<const uint8_t> bytes, Standing* standing) {
  standing->state = read_as<Standing::State>(&bytes[kStateAt]);
  if (standing->state > Standing::State::kAlive) return false;
  std::memcpy(&standing->last, &bytes[kBodyAt], sizeof(standing->last));
  return standing->last.kind == OpKind::kNone || is_plausible(standing->last);
}

}  // namespace

ControlFrame left_frame(int rank) { return {ControlFrame::Type::kLeft, rank, {}, {}, {}}; }
ControlFrame dead_frame(int rank) { return {ControlFrame::Type::kDead, rank, {}, {}, {}}; }
ControlFrame poison_frame(const Poison& poison) { return {ControlFrame::Type::kPoison, -1, poison, {}, {}}; }
ControlFrame standing_frame(int rank, const Standing& standing) {
  return {ControlFrame::Type::kStanding, rank, {}, standing, {}};
}
ControlFrame notice_frame(int rank, std::string notice) {
  return {ControlFrame::Type::kNotice, rank, {}, {}, std::move(notice)};
}

std::array<uint8_t, ControlFrame::kBytes> encode(const ControlFrame& frame) {
  std::array<uint8_t, ControlFrame::kBytes> bytes{};
  put(&bytes[0], kMagic);
  put(&bytes[kTypeAt], frame.type);
  put(&bytes[kRankAt], frame.rank);
  if (frame.type == ControlFrame::Type::kPoison) {
    put(&bytes[kKindAt], frame.poison.kind);
    put(&bytes[kCulpritAt], static_cast<int32_t>(frame.poison.rank));
    put(&bytes[kPidAt], frame.poison.pid);
    put(&bytes[kSequenceAt], frame.poison.sequence);
    put_text(&bytes[kHostAt], 128, frame.poison.host);
    put_text(&bytes[kOpAt], 128, frame.poison.op);
    put_text(&bytes[kBodyAt], PoisonRecord::kCauseBytes, frame.poison.cause);
  } else if (frame.type == ControlFrame::Type::kStanding) {
    put(&bytes[kStateAt], frame.standing.state);
    put(&bytes[kBodyAt], frame.standing.last);
  } else if (frame.type == ControlFrame::Type::kNotice) {
    put_text(&bytes[kBodyAt], ControlBlock::kNoticeBytes, frame.notice);
  }
  return bytes;
}

std::optional<ControlFrame> decode_control_frame(std::span<const uint8_t> bytes, int world_size) {
  if (bytes.size() != ControlFrame::kBytes || read_as<uint32_t>(&bytes[0]) != kMagic) return std::nullopt;
  ControlFrame frame;
  frame.type = read_as<ControlFrame::Type>(&bytes[kTypeAt]);
  frame.rank = read_as<int32_t>(&bytes[kRankAt]);
  const bool valid_rank = frame.rank >= 0 && frame.rank < world_size;
  bool valid = false;
  switch (frame.type) {
    case ControlFrame::Type::kPoison:
      valid = decode_poison(bytes, &frame.poison);
      break;
    case ControlFrame::Type::kLeft:
    case ControlFrame::Type::kDead:
      valid = valid_rank;
      break;
    case ControlFrame::Type::kAsk:
      valid = true;
      break;
    case ControlFrame::Type::kStanding:
      valid = valid_rank && decode_standing(bytes, &frame.standing);
      break;
    case ControlFrame::Type::kNotice:
      frame.notice = text_at(&bytes[kBodyAt], ControlBlock::kNoticeBytes);
      valid = valid_rank;
      break;
  }
  return valid ? std::optional(frame) : std::nullopt;
}

}  // namespace mlsys::comm
