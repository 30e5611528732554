// Writes the little of Python's pickle format that a dump needs: None, bool, int, str, list, tuple of two,
// dict. Protocol 2 (PEP 307). Nothing in it names a class, so a reader may refuse everything that does.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace mlsys::comm {

class PickleWriter {
 public:
  PickleWriter() : bytes_("\x80\x02") {}

  void none() { bytes_ += 'N'; }
  void boolean(bool value) { bytes_ += value ? '\x88' : '\x89'; }
  void integer(int64_t value) {
    bytes_ += "\x8a\x08";  // LONG1, eight bytes in little-endian two's complement
    little_endian(static_cast<uint64_t>(value), 8);
  }
  void text(std::string_view value) {
    bytes_ += 'X';
    little_endian(value.size(), 4);
    bytes_ += value;
  }
  // Between the two: the items of a list, or key, value, key, value of a dict.
  void begin_list() { bytes_ += "]("; }
  void end_list() { bytes_ += 'e'; }
  void begin_dict() { bytes_ += "}("; }
  void end_dict() { bytes_ += 'u'; }
  // Makes one tuple of the last two values.
  void pair() { bytes_ += '\x86'; }

  std::string finish() && { return std::move(bytes_ += '.'); }

 private:
  void little_endian(uint64_t value, int num_bytes) {
    for (int i = 0; i < num_bytes; ++i) bytes_ += static_cast<char>(value >> (8 * i) & 0xff);
  }

  std::string bytes_;
};

}  // namespace mlsys::comm
