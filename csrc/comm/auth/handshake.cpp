#include "comm/auth/handshake.h"

#include <sys/random.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "comm/wire.h"

namespace mlsys::comm {
namespace {

constexpr size_t kChallengeBytes = 20;  // magic, nonce
constexpr size_t kDigestBytes = 36;     // magic, digest
constexpr uint32_t kChallengeMagic = 0x43534c4d;
constexpr uint32_t kProofMagic = 0x50534c4d;
constexpr uint32_t kWelcomeMagic = 0x57534c4d;

template <size_t kBytes>
std::array<uint8_t, kBytes + 4> framed(uint32_t magic, const std::array<uint8_t, kBytes>& body) {
  std::array<uint8_t, kBytes + 4> frame;
  put(frame.data(), magic);
  std::memcpy(frame.data() + 4, body.data(), kBytes);
  return frame;
}

}  // namespace

std::array<uint8_t, Hello::kBytes> encode(const Hello& hello) {
  std::array<uint8_t, Hello::kBytes> bytes{};
  put(&bytes[0], Hello::kMagic);
  put(&bytes[4], Hello::kVersion);
  put(&bytes[6], hello.purpose);
  put(&bytes[8], hello.rank);
  put(&bytes[12], hello.size);
  put(&bytes[16], hello.group);
  std::memcpy(&bytes[24], hello.nonce.data(), hello.nonce.size());
  put(&bytes[40], hello.lane);
  return bytes;
}

std::optional<Hello> decode_hello(std::span<const uint8_t> bytes) {
  if (bytes.size() != Hello::kBytes) return std::nullopt;
  if (read_as<uint32_t>(&bytes[0]) != Hello::kMagic || read_as<uint16_t>(&bytes[4]) != Hello::kVersion) {
    return std::nullopt;
  }
  const auto purpose = read_as<uint16_t>(&bytes[6]);
  if (purpose < static_cast<uint16_t>(Purpose::kLocality) ||
      purpose > static_cast<uint16_t>(Purpose::kPointToPoint)) {
    return std::nullopt;
  }
  Hello hello;
  hello.purpose = static_cast<Purpose>(purpose);
  hello.rank = read_as<int32_t>(&bytes[8]);
  hello.size = read_as<int32_t>(&bytes[12]);
  hello.group = read_as<uint64_t>(&bytes[16]);
  std::memcpy(hello.nonce.data(), &bytes[24], hello.nonce.size());
  hello.lane = read_as<uint16_t>(&bytes[40]);
  if (hello.rank < 0 || hello.rank >= hello.size) return std::nullopt;
  for (size_t i = 42; i < Hello::kBytes; ++i) {
    if (bytes[i] != 0) return std::nullopt;  // reserved
  }
  return hello;
}

uint64_t hash_name(const std::string& name) {
  const Digest digest = sha256({reinterpret_cast<const uint8_t*>(name.data()), name.size()});
  return read_as<uint64_t>(digest.data());
}

Nonce random_nonce() {
  Nonce nonce;
  if (::getrandom(nonce.data(), nonce.size(), 0) != static_cast<ssize_t>(nonce.size()))
    throw_errno("getrandom");
  return nonce;
}

Handshake::Handshake(UniqueFd fd, const Credentials& credentials, Stage stage)
    : fd_(std::move(fd)),
      credentials_(credentials),
      stage_(stage),
      started_(std::chrono::steady_clock::now()) {}

Handshake Handshake::call(UniqueFd fd, const Credentials& credentials, Purpose purpose, int peer, int lane) {
  Handshake handshake(std::move(fd), credentials, Stage::kSendHello);
  handshake.hello_ = {purpose,           credentials.rank, credentials.size,
                      credentials.group, random_nonce(),   static_cast<uint16_t>(lane)};
  handshake.peer_ = peer;
  return handshake;
}

Handshake Handshake::accept(UniqueFd fd, const Credentials& credentials) {
  return Handshake(std::move(fd), credentials, Stage::kAwaitHello);
}

HandshakeState Handshake::fail(std::string why) {
  failure_ = std::move(why);
  stage_ = Stage::kFailed;
  fd_.reset();
  return HandshakeState::kFailed;
}

bool Handshake::send_all(std::span<const uint8_t> bytes) {
  const ssize_t sent = ::send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  return sent == static_cast<ssize_t>(bytes.size());
}

bool Handshake::receive(size_t bytes) {
  while (inbox_.size() < bytes) {
    uint8_t buffer[64];
    const size_t wanted = std::min(sizeof(buffer), bytes - inbox_.size());
    const ssize_t got = ::recv(fd_.get(), buffer, wanted, MSG_DONTWAIT);
    if (got > 0) {
      inbox_.insert(inbox_.end(), buffer, buffer + got);
      continue;
    }
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return false;
    fail(got == 0 ? "the peer closed the connection"
                  : std::string("receive failed: ") + std::strerror(errno));
    return false;
  }
  return true;
}

size_t Handshake::expected_bytes() const {
  switch (stage_) {
    case Stage::kAwaitHello:
      return Hello::kBytes;
    case Stage::kAwaitChallenge:
      return kChallengeBytes;
    default:
      return kDigestBytes;
  }
}

Digest Handshake::proof(const char* role) const {
  std::vector<uint8_t> message(role, role + std::strlen(role));
  const auto hello = encode(hello_);
  message.insert(message.end(), hello.begin(), hello.end());
  message.insert(message.end(), challenge_.begin(), challenge_.end());
  const std::string& key = credentials_.job_key;
  return hmac_sha256({reinterpret_cast<const uint8_t*>(key.data()), key.size()}, message);
}

HandshakeState Handshake::step() {
  if (stage_ == Stage::kSendHello) {
    int error = 0;
    socklen_t length = sizeof(error);
    if (::getsockopt(fd_.get(), SOL_SOCKET, SO_ERROR, &error, &length) != 0) error = errno;
    refused_ = error != 0;
    if (refused_) return fail(std::string("connect failed: ") + std::strerror(error));
    if (!send_all(encode(hello_))) {
      if (errno == EAGAIN || errno == ENOTCONN) return HandshakeState::kUnderWay;
      return fail(std::string("send failed: ") + std::strerror(errno));
    }
    stage_ = Stage::kAwaitChallenge;
  }
  while (stage_ != Stage::kDone && stage_ != Stage::kFailed) {
    if (!receive(expected_bytes())) break;
    const HandshakeState state = advance();
    if (state != HandshakeState::kUnderWay) return state;
  }
  return stage_ == Stage::kFailed ? HandshakeState::kFailed : HandshakeState::kUnderWay;
}

// One complete message of the expected size is in the inbox.
HandshakeState Handshake::advance() {
  const std::vector<uint8_t> message = std::exchange(inbox_, {});
  if (stage_ == Stage::kAwaitHello) {
    const std::optional<Hello> hello = decode_hello(message);
    if (!hello) return fail("no valid greeting");
    if (hello->group != credentials_.group || hello->size != credentials_.size) return fail("another group");
    hello_ = *hello;
    challenge_ = random_nonce();
    if (!send_all(framed(kChallengeMagic, challenge_))) return fail("the challenge could not be sent");
    stage_ = Stage::kAwaitProof;
    return HandshakeState::kUnderWay;
  }
  const auto magic = read_as<uint32_t>(message.data());
  if (stage_ == Stage::kAwaitChallenge) {
    if (magic != kChallengeMagic) return fail("no valid challenge");
    std::memcpy(challenge_.data(), message.data() + 4, challenge_.size());
    if (!send_all(framed(kProofMagic, proof("caller")))) return fail("the proof could not be sent");
    stage_ = Stage::kAwaitWelcome;
    return HandshakeState::kUnderWay;
  }
  Digest digest;
  std::memcpy(digest.data(), message.data() + 4, digest.size());
  const bool accepting = stage_ == Stage::kAwaitProof;
  if (magic != (accepting ? kProofMagic : kWelcomeMagic) ||
      !equal_digests(digest, proof(accepting ? "caller" : "acceptor"))) {
    return fail("the peer does not know the job's key");
  }
  if (accepting) {
    if (!send_all(framed(kWelcomeMagic, proof("acceptor")))) return fail("the welcome could not be sent");
    peer_ = hello_.rank;
  }
  stage_ = Stage::kDone;
  return HandshakeState::kDone;
}

}  // namespace mlsys::comm
