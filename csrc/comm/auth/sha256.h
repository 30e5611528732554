// SHA-256 (FIPS 180-4) and HMAC-SHA-256 (RFC 2104), for the handshake of the data sockets: a few hundred
// bytes a connection, so plain code is fast enough. Tests: the vectors of FIPS 180-4 and RFC 4231.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace mlsys::comm {

using Digest = std::array<uint8_t, 32>;

Digest sha256(std::span<const uint8_t> message);
Digest hmac_sha256(std::span<const uint8_t> key, std::span<const uint8_t> message);

// Compares without telling by its duration where the first difference is.
bool equal_digests(const Digest& left, const Digest& right);

}  // namespace mlsys::comm
