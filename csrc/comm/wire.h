// Fields of frames at fixed offsets: any alignment, little-endian (as all supported machines are).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

namespace mlsys::comm {

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

// Cuts the text so that a zero byte stays at the end of the field, which is zero before.
inline void put_text(uint8_t* target, size_t room, const std::string& text) {
  std::memcpy(target, text.data(), std::min(text.size(), room - 1));
}

inline std::string text_at(const uint8_t* source, size_t room) {
  const auto* text = reinterpret_cast<const char*>(source);
  return std::string(text, ::strnlen(text, room - 1));
}

}  // namespace mlsys::comm
