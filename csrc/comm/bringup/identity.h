// What a rank tells the others about itself through the store before they are connected.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace mlsys::comm {

struct Identity {
  std::string host;            // for messages
  std::string boot_id;         // of the kernel: ranks of different kernels cannot share memory
  std::string network_space;   // abstract unix sockets are seen within one network namespace only
  std::string socket_name;     // abstract unix socket for proving locality
  std::string message_socket;  // abstract unix socket for point-to-point messages
  std::string process_space;   // pids mean the same within one process namespace only
  int64_t pid = 0;
  int32_t locality = -1;  // Options::locality of this rank
  std::string failure;    // not empty: this rank failed before it could connect, and why
};

Identity identify(int locality);

std::vector<uint8_t> encode(const Identity& identity);
// Nothing when the bytes are not an Identity.
std::optional<Identity> decode_identity(std::span<const uint8_t> bytes);

}  // namespace mlsys::comm
