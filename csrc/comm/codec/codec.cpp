#include "comm/codec/codec.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "core/half.h"
#include "core/simd_dispatch.h"

namespace mlsys::comm {
namespace {

constexpr size_t kBlock = Codec::kBlock;
constexpr size_t kScaleBytes = sizeof(float);
constexpr uint32_t kMagnitude = 0x7fffffff;
constexpr uint32_t kInfinity = 0x7f800000;
constexpr uint32_t kSmallest = 0x0d800000;  // 2^-100: below it 127 / largest could overflow
constexpr uint32_t kLargest = 0x7f000000;   // 2^127: 127 * (largest / 127) cannot overflow
// Adding 1.5 * 2^23 leaves no bits after the binary point, so the addition itself rounds to nearest even, and
// the low bits of the sum are the integer. Holds for magnitudes below 2^22.
constexpr float kRounder = 12582912.0F;
constexpr float kTop = 127.0F;
constexpr float kTopBesideSpecials = 126.0F;
constexpr int8_t kPlusInf = 127, kMinusInf = -127, kNan = -128;

MLSYS_INLINE bool is_finite_bits(float value) { return (bits_of(value) & kInfinity) != kInfinity; }

// The flags of the kernels are template parameters: a test inside a loop would keep it from being vectorised.
template <bool kFeedback>
struct EncodeBf16 {
  MLSYS_INLINE void operator()(const float* values, float* residual, std::byte* encoded, size_t count) const {
    for (size_t i = 0; i < count; ++i) {
      const float sum = kFeedback ? values[i] + residual[i] : values[i];
      const BFloat16 element = to_bfloat16(sum);
      std::memcpy(encoded + 2 * i, &element.bits, 2);
      if constexpr (kFeedback) {
        const float lost = sum - to_float(element);
        residual[i] = is_finite_bits(lost) ? lost : 0.0F;
      }
    }
  }
};

template <bool kAdds>
struct DecodeBf16 {
  MLSYS_INLINE void operator()(const std::byte* encoded, float* values, size_t count) const {
    for (size_t i = 0; i < count; ++i) {
      BFloat16 element;
      std::memcpy(&element.bits, encoded + 2 * i, 2);
      values[i] = kAdds ? values[i] + to_float(element) : to_float(element);
    }
  }
};

MLSYS_INLINE int8_t rounded(float value, float top) {
  const float clamped = std::min(std::max(value, -top), top);
  return static_cast<int8_t>(static_cast<int32_t>(bits_of(clamped + kRounder)) -
                             static_cast<int32_t>(bits_of(kRounder)));
}

struct Scale {
  float value;
  float inverse;
};

// Of a block whose largest finite magnitude has these bits, with bytes up to `top`.
MLSYS_INLINE Scale scale_for(uint32_t largest, float top) {
  if (largest < kSmallest) return {0.0F, 0.0F};
  const float magnitude = float_from_bits(std::min(largest, kLargest));
  return {magnitude / top, top / magnitude};
}

// A block with an inf or a nan; rare, so a plain loop.
void encode_special(const float* sums, float* residual, std::byte* encoded, size_t count) {
  uint32_t largest = 0;
  for (size_t i = 0; i < count; ++i) {
    if (is_finite_bits(sums[i])) largest = std::max(largest, bits_of(sums[i]) & kMagnitude);
  }
  const Scale scale = scale_for(largest, kTopBesideSpecials);
  const float flagged = -scale.value;  // -0.0 too has the sign bit set
  std::memcpy(encoded, &flagged, kScaleBytes);
  for (size_t i = 0; i < count; ++i) {
    int8_t byte = kNan;
    float lost = 0.0F;
    if (is_finite_bits(sums[i])) {
      byte = rounded(sums[i] * scale.inverse, kTopBesideSpecials);
      lost = sums[i] - static_cast<float>(byte) * scale.value;
    } else if ((bits_of(sums[i]) & kMagnitude) == kInfinity) {
      byte = std::signbit(sums[i]) ? kMinusInf : kPlusInf;
    }
    encoded[kScaleBytes + i] = std::bit_cast<std::byte>(byte);
    if (residual != nullptr) residual[i] = lost;
  }
}

template <bool kFeedback>
struct EncodeInt8 {
  MLSYS_INLINE void operator()(const float* values, float* residual, std::byte* encoded, size_t count) const {
    for (size_t first = 0; first < count; first += kBlock) {
      const size_t n = std::min(kBlock, count - first);
      block(values + first, kFeedback ? residual + first : nullptr, encoded, n);
      encoded += kScaleBytes + n;
    }
  }

 private:
  static MLSYS_INLINE void block(const float* values, float* residual, std::byte* encoded, size_t n) {
    alignas(64) float sums[kBlock];
    uint32_t largest = 0;  // magnitudes compare as their bits do, and integers have a maximum in any order
    for (size_t i = 0; i < n; ++i) {
      sums[i] = kFeedback ? values[i] + residual[i] : values[i];
      largest = std::max(largest, bits_of(sums[i]) & kMagnitude);
    }
    if (largest >= kInfinity) return encode_special(sums, residual, encoded, n);
    const Scale scale = scale_for(largest, kTop);
    std::memcpy(encoded, &scale.value, kScaleBytes);
    auto* bytes = reinterpret_cast<int8_t*>(encoded + kScaleBytes);
    for (size_t i = 0; i < n; ++i) {
      const int8_t byte = rounded(sums[i] * scale.inverse, kTop);
      bytes[i] = byte;
      if constexpr (kFeedback) residual[i] = sums[i] - static_cast<float>(byte) * scale.value;
    }
  }
};

void decode_special(const std::byte* encoded, float scale, float* values, size_t count, bool adds) {
  for (size_t i = 0; i < count; ++i) {
    const auto byte = std::bit_cast<int8_t>(encoded[i]);
    float value = static_cast<float>(byte) * -scale;
    if (byte == kPlusInf) value = std::numeric_limits<float>::infinity();
    if (byte == kMinusInf) value = -std::numeric_limits<float>::infinity();
    if (byte == kNan) value = std::numeric_limits<float>::quiet_NaN();
    values[i] = adds ? values[i] + value : value;
  }
}

template <bool kAdds>
struct DecodeInt8 {
  MLSYS_INLINE void operator()(const std::byte* encoded, float* values, size_t count) const {
    for (size_t first = 0; first < count; first += kBlock) {
      const size_t n = std::min(kBlock, count - first);
      float scale = 0.0F;
      std::memcpy(&scale, encoded, kScaleBytes);
      const auto* bytes = reinterpret_cast<const int8_t*>(encoded + kScaleBytes);
      float* target = values + first;
      if ((bits_of(scale) & ~kMagnitude) != 0) {
        decode_special(encoded + kScaleBytes, scale, target, n, kAdds);
      } else {
        for (size_t i = 0; i < n; ++i) {
          const float value = static_cast<float>(bytes[i]) * scale;
          target[i] = kAdds ? target[i] + value : value;
        }
      }
      encoded += kScaleBytes + n;
    }
  }
};

struct Divide {
  MLSYS_INLINE void operator()(float* values, size_t count, float divisor) const {
    for (size_t i = 0; i < count; ++i) values[i] /= divisor;
  }
};

}  // namespace

size_t Codec::encoded_bytes(size_t count) const {
  if (compression_ == Compression::kBFloat16) return count * sizeof(BFloat16);
  return count + (count + kBlock - 1) / kBlock * kScaleBytes;
}

void Codec::encode(const float* values, float* residual, std::byte* encoded, size_t count) const {
  const auto run = [&](const auto& kernel) { run_simd(level_, kernel, values, residual, encoded, count); };
  const bool feedback = residual != nullptr;
  if (compression_ == Compression::kBFloat16) {
    feedback ? run(EncodeBf16<true>{}) : run(EncodeBf16<false>{});
  } else {
    feedback ? run(EncodeInt8<true>{}) : run(EncodeInt8<false>{});
  }
}

void Codec::decode(const std::byte* encoded, float* values, size_t count, float divisor) const {
  if (compression_ == Compression::kBFloat16) {
    run_simd(level_, DecodeBf16<false>{}, encoded, values, count);
  } else {
    run_simd(level_, DecodeInt8<false>{}, encoded, values, count);
  }
  if (divisor != 1.0F) run_simd(level_, Divide{}, values, count, divisor);
}

void Codec::decode_add(const std::byte* encoded, float* sum, size_t count) const {
  if (compression_ == Compression::kBFloat16) {
    run_simd(level_, DecodeBf16<true>{}, encoded, sum, count);
  } else {
    run_simd(level_, DecodeInt8<true>{}, encoded, sum, count);
  }
}

}  // namespace mlsys::comm
