#include "comm/bringup/identity.h"

#include <unistd.h>

#include <array>
#include <cstring>
#include <fstream>
#include <thread>

#include "comm/auth/handshake.h"
#include "comm/bringup/liveness.h"

namespace mlsys::comm {
namespace {

constexpr uint32_t kMagic = 0x49534c4d;  // "MLSI"
constexpr size_t kMostText = 4096;
constexpr std::chrono::milliseconds kSlice{100};

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

Rendezvous::Rendezvous(std::shared_ptr<Store> store, std::string prefix, std::chrono::milliseconds timeout,
                       std::function<bool()> stop, const Liveness& liveness)
    : store_(std::move(store)),
      prefix_(std::move(prefix)),
      deadline_(std::chrono::steady_clock::now() + timeout),
      stop_(std::move(stop)),
      liveness_(liveness) {}

void Rendezvous::put(const std::string& kind, int rank, const std::vector<uint8_t>& value) {
  store_->set(prefix_ + "/" + kind + "/" + std::to_string(rank), value);
}

std::vector<uint8_t> Rendezvous::get(const std::string& kind, int rank, bool needs_all) {
  const std::string key = prefix_ + "/" + kind + "/" + std::to_string(rank);
  int num_quick_failures = 0;
  for (;;) {
    const auto started = std::chrono::steady_clock::now();
    if (stop_()) throw TimedOut("the group was shut down while it was still connecting.");
    // Looked up first: if the key is missing even after that, the death was no orderly end.
    const int dead = needs_all ? liveness_.first_dead() : (liveness_.is_dead(rank) ? rank : -1);
    try {
      return store_->get(key, kSlice);
    } catch (const std::exception& error) {
      if (dead >= 0) throw liveness_.failure_of(dead);
      const auto now = std::chrono::steady_clock::now();
      if (now >= deadline_) {
        throw TimedOut("timed out while connecting the group: nothing heard from group rank " +
                       std::to_string(rank) + " (store key " + key + "): " + error.what());
      }
      // A store that is gone fails at once, again and again; a key that is not there yet fails after the
      // slice.
      num_quick_failures = now - started < kSlice / 2 ? num_quick_failures + 1 : 0;
      if (num_quick_failures >= 20) throw;
      if (num_quick_failures > 0) std::this_thread::sleep_for(kSlice / 10);
    }
  }
}

}  // namespace mlsys::comm
