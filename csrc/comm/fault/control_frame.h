// What the ranks of different hosts tell each other over their control connections: who failed, who has left,
// what each is doing when somebody asks because of a timeout, and the notices by which survivors regroup.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "comm/fault/faults.h"
#include "comm/fault/inquest.h"

namespace mlsys::comm {

struct ControlFrame {
  static constexpr size_t kBytes = 2360;
  enum class Type : uint32_t { kPoison = 1, kLeft = 2, kAsk = 3, kStanding = 4, kNotice = 5, kDead = 6 };

  Type type = Type::kLeft;
  int32_t rank = -1;   // group rank, for kLeft, kDead, kStanding and kNotice
  Poison poison;       // for kPoison
  Standing standing;   // for kStanding
  std::string notice;  // for kNotice
};

ControlFrame left_frame(int rank);
ControlFrame dead_frame(int rank);
ControlFrame poison_frame(const Poison& poison);
ControlFrame standing_frame(int rank, const Standing& standing);
ControlFrame notice_frame(int rank, std::string notice);

std::array<uint8_t, ControlFrame::kBytes> encode(const ControlFrame& frame);
// Nothing when the bytes are no frame; the ranks are checked against `world_size` (a poison's rank may be
// -1).
std::optional<ControlFrame> decode_control_frame(std::span<const uint8_t> bytes, int world_size);

}  // namespace mlsys::comm
