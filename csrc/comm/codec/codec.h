// The encodings in which fp32 values travel between hosts, and the error feedback of their rounding.
//
// bf16: 2 bytes an element, rounded to nearest even. inf and nan pass; a value beyond bf16's largest becomes
// inf,
//       as in any conversion.
// int8: blocks of kBlock elements, each one fp32 scale and kBlock signed bytes: value = byte * scale, with
//       scale = (largest magnitude of the block) / 127, bytes rounded to nearest even. Magnitudes above 2^127
//       saturate there. A block whose largest magnitude is below 2^-100 is sent as zeros. A block that holds
//       an inf or a nan has its scale's sign bit set and keeps 127, -127 and -128 for inf, -inf and nan;
//       its finite values then lie in [-126, 126], so that one bad element spoils no other.
//
// Error feedback: encode() adds residual[i] to values[i] first and leaves in residual[i] what the encoding
// lost of the sum; a value that is not finite, or becomes so, leaves 0. Hence decoded + residual = value +
// old residual, up to one fp32 rounding, and what one call loses the next one sends. Seide et al.,
// Interspeech 2014; Karimireddy et al., ICML 2019.
//
// Pointers may have any alignment that float allows; encoded bytes any at all. All instruction sets give the
// same bytes. Reference and test: tests/native/test_codec.cpp.
#pragma once

#include <cstddef>

#include "comm/communicator.h"
#include "core/cpu.h"

namespace mlsys::comm {

class Codec {
 public:
  // Elements: where encoded data may be cut. One fp32 scale in 256 makes int8 1.6% larger than its bytes.
  static constexpr size_t kBlock = 256;

  explicit Codec(Compression compression, SimdLevel level = simd_level())
      : compression_(compression), level_(level) {}

  size_t encoded_bytes(size_t count) const;
  // `residual` is null for an encoding without error feedback.
  void encode(const float* values, float* residual, std::byte* encoded, size_t count) const;
  // values = decoded / divisor.
  void decode(const std::byte* encoded, float* values, size_t count, float divisor = 1.0F) const;
  // sum += decoded.
  void decode_add(const std::byte* encoded, float* sum, size_t count) const;

 private:
  Compression compression_;
  SimdLevel level_;
};

}  // namespace mlsys::comm
