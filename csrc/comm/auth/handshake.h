// How two ranks prove to each other that they belong to the same job, before any payload moves.
//
//   caller   -> Hello      magic, version, purpose, rank, size, group, nonce, lane
//   acceptor -> Challenge  nonce
//   caller   -> Proof      HMAC(key, "caller"   | Hello | Challenge)
//   acceptor -> Welcome    HMAC(key, "acceptor" | Hello | Challenge)
//
// Messages have fixed sizes and are small enough to fit any socket buffer, so sending never waits. Both sides
// are non-blocking state machines: step() does what can be done now. Whatever is not exactly as expected
// (magic, version, group, rank out of range, a wrong HMAC) fails the connection and nothing else. The parsing
// functions take untrusted bytes and are fuzzed by tests/native/fuzz_wire.cpp.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "comm/auth/sha256.h"
#include "memory/posix.h"

namespace mlsys::comm {

enum class Purpose : uint16_t { kLocality = 1, kData = 2, kControl = 3, kPointToPoint = 4 };

using Nonce = std::array<uint8_t, 16>;

struct Hello {
  static constexpr size_t kBytes = 48;
  static constexpr uint32_t kMagic = 0x48534c4d;  // "MLSH"
  static constexpr uint16_t kVersion = 1;

  Purpose purpose = Purpose::kData;
  int32_t rank = 0;  // group rank of the caller
  int32_t size = 0;
  uint64_t group = 0;  // hash of the group's name
  Nonce nonce{};
  uint16_t lane = 0;  // which of the sockets between the two ranks this is
};

std::array<uint8_t, Hello::kBytes> encode(const Hello& hello);
// Nothing when the bytes are no Hello of this version, with a rank inside its size and a known purpose.
std::optional<Hello> decode_hello(std::span<const uint8_t> bytes);

// What both ends of a communicator know.
struct Credentials {
  std::string job_key;
  int32_t rank = 0;
  int32_t size = 1;
  uint64_t group = 0;
};

uint64_t hash_name(const std::string& name);
Nonce random_nonce();

enum class HandshakeState { kUnderWay, kDone, kFailed };

// One end of a handshake on a connected (or connecting) non-blocking socket.
class Handshake {
 public:
  // A peer that takes longer than this is dropped.
  static constexpr std::chrono::seconds kPatience{5};

  // Calls: sends Hello once the socket is writable.
  static Handshake call(UniqueFd fd, const Credentials& credentials, Purpose purpose, int peer, int lane = 0);
  // Accepts: waits for a Hello from anyone.
  static Handshake accept(UniqueFd fd, const Credentials& credentials);

  // Reads and writes what is possible now. Never blocks, never throws for what the peer does.
  HandshakeState step();

  bool wants_to_write() const { return stage_ == Stage::kSendHello; }
  // After kFailed: the connection could not even be made.
  bool refused() const { return refused_; }
  // False as long as nothing that looks like a peer has been heard.
  bool greeted() const { return stage_ != Stage::kAwaitHello; }
  int fd() const { return fd_.get(); }
  UniqueFd take_fd() { return std::move(fd_); }
  int peer() const { return peer_; }  // group rank, known once done
  Purpose purpose() const { return hello_.purpose; }
  int lane() const { return hello_.lane; }
  std::chrono::steady_clock::time_point started() const { return started_; }
  const std::string& failure() const { return failure_; }

 private:
  enum class Stage { kSendHello, kAwaitChallenge, kAwaitWelcome, kAwaitHello, kAwaitProof, kDone, kFailed };

  Handshake(UniqueFd fd, const Credentials& credentials, Stage stage);
  HandshakeState fail(std::string why);
  bool send_all(std::span<const uint8_t> bytes);
  bool receive(size_t bytes);  // true when inbox_ holds that many
  size_t expected_bytes() const;
  HandshakeState advance();
  Digest proof(const char* role) const;

  UniqueFd fd_;
  Credentials credentials_;
  Stage stage_;
  Hello hello_;
  int peer_ = -1;
  Nonce challenge_{};
  std::vector<uint8_t> inbox_;
  std::string failure_;
  bool refused_ = false;
  std::chrono::steady_clock::time_point started_;
};

}  // namespace mlsys::comm
