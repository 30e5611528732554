#include "comm/bringup/identity.h"

#include <unistd.h>

#include <cstring>
#include <fstream>

#include "comm/auth/handshake.h"
#include "memory/posix.h"

namespace mlsys::comm {
namespace {

constexpr uint32_t kMagic = 0x49534c4d;  // "MLSI"
constexpr size_t kMostText = 4096;

void put_text(std::vector<uint8_t>& bytes, const std::string& text) {
  const auto length = static_cast<uint32_t>(std::min(text.size(), kMostText));
  const auto* raw = reinterpret_cast<const uint8_t*>(&length);
  bytes.insert(bytes.end(), raw, raw + sizeof(length));
  bytes.insert(bytes.end(), text.begin(), text.begin() + length);
}

template <class T>
void put_number(std::vector<uint8_t>& bytes, T value) {
  const auto* raw = reinterpret_cast<const uint8_t*>(&value);
  bytes.insert(bytes.end(), raw, raw + sizeof(value));
}

class Reader {
 public:
  explicit Reader(std::span<const uint8_t> bytes) : bytes_(bytes) {}
  template <class T>
  bool number(T* value) {
    if (bytes_.size() < sizeof(T)) return false;
    std::memcpy(value, bytes_.data(), sizeof(T));
    bytes_ = bytes_.subspan(sizeof(T));
    return true;
  }
  bool text(std::string* value) {
    uint32_t length = 0;
    if (!number(&length) || length > kMostText || length > bytes_.size()) return false;
    value->assign(reinterpret_cast<const char*>(bytes_.data()), length);
    bytes_ = bytes_.subspan(length);
    return true;
  }
  bool at_end() const { return bytes_.empty(); }

 private:
  std::span<const uint8_t> bytes_;
};

std::string hex(const Nonce& nonce) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const uint8_t byte : nonce) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

}  // namespace

Identity identify(int locality) {
  Identity identity;
  std::array<char, 256> host{};
  if (::gethostname(host.data(), host.size() - 1) != 0) throw_errno("gethostname");
  identity.host = host.data();
  std::ifstream("/proc/sys/kernel/random/boot_id") >> identity.boot_id;
  std::array<char, 256> space{};
  if (::readlink("/proc/self/ns/net", space.data(), space.size() - 1) > 0)
    identity.network_space = space.data();
  space = {};
  if (::readlink("/proc/self/ns/pid", space.data(), space.size() - 1) > 0)
    identity.process_space = space.data();
  identity.pid = ::getpid();
  identity.locality = locality;
  const std::string stem = "mlsys-" + std::to_string(identity.pid) + "-" + hex(random_nonce());
  identity.socket_name = stem + "-l";
  identity.message_socket = stem + "-m";
  return identity;
}

std::vector<uint8_t> encode(const Identity& identity) {
  std::vector<uint8_t> bytes;
  put_number(bytes, kMagic);
  for (const std::string* text :
       {&identity.host, &identity.boot_id, &identity.network_space, &identity.process_space,
        &identity.socket_name, &identity.message_socket, &identity.failure}) {
    put_text(bytes, *text);
  }
  put_number(bytes, identity.pid);
  put_number(bytes, identity.locality);
  return bytes;
}

std::optional<Identity> decode_identity(std::span<const uint8_t> bytes) {
  Identity identity;
  Reader reader(bytes);
  uint32_t magic = 0;
  if (!reader.number(&magic) || magic != kMagic) return std::nullopt;
  for (std::string* text :
       {&identity.host, &identity.boot_id, &identity.network_space, &identity.process_space,
        &identity.socket_name, &identity.message_socket, &identity.failure}) {
    if (!reader.text(text)) return std::nullopt;
  }
  if (!reader.number(&identity.pid) || !reader.number(&identity.locality) || !reader.at_end())
    return std::nullopt;
  return identity;
}

}  // namespace mlsys::comm
