// What leaders of different hosts tell each other over their control connections: who failed, and who has
// left.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>

#include "comm/fault/faults.h"

namespace mlsys::comm {

struct ControlFrame {
  static constexpr size_t kBytes = 2360;
  enum class Type : uint32_t { kPoison = 1, kLeft = 2 };

  Type type = Type::kLeft;
  int32_t left_rank = -1;  // group rank, for kLeft
  Poison poison;           // for kPoison
};

std::array<uint8_t, ControlFrame::kBytes> encode(const ControlFrame& frame);
// Nothing when the bytes are no frame; the ranks are checked against `world_size` (a poison's rank may be
// -1).
std::optional<ControlFrame> decode_control_frame(std::span<const uint8_t> bytes, int world_size);

}  // namespace mlsys::comm
