// SHA-256, HMAC and the handshake.
#include <sys/socket.h>

#include "check.h"
#include "comm/auth/handshake.h"

namespace {

using namespace mlsys::comm;

std::span<const uint8_t> bytes(const std::string& text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

std::string hex(const Digest& digest) {
  std::string text;
  for (const uint8_t byte : digest) {
    char two[3];
    std::snprintf(two, sizeof(two), "%02x", byte);
    text += two;
  }
  return text;
}

// Runs both ends to their end.
std::pair<HandshakeState, HandshakeState> shake(const Credentials& caller, const Credentials& acceptor) {
  int ends[2];
  CHECK_EQUAL(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends), 0);
  Handshake call = Handshake::call(mlsys::UniqueFd(ends[0]), caller, Purpose::kData, 0);
  Handshake accept = Handshake::accept(mlsys::UniqueFd(ends[1]), acceptor);
  HandshakeState left = HandshakeState::kUnderWay, right = HandshakeState::kUnderWay;
  for (int round = 0; round < 10; ++round) {
    if (left == HandshakeState::kUnderWay) left = call.step();
    if (right == HandshakeState::kUnderWay) right = accept.step();
  }
  if (right == HandshakeState::kDone) CHECK_EQUAL(accept.peer(), caller.rank);
  return {left, right};
}

}  // namespace

TEST(sha256_matches_the_vectors_of_fips_180) {
  CHECK_EQUAL(hex(sha256({})),
              std::string("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"));
  CHECK_EQUAL(hex(sha256(bytes("abc"))),
              std::string("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"));
  CHECK_EQUAL(hex(sha256(bytes("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"))),
              std::string("248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"));
  CHECK_EQUAL(hex(sha256(bytes(std::string(1000000, 'a')))),
              std::string("cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"));
}

TEST(hmac_matches_the_vectors_of_rfc_4231) {
  CHECK_EQUAL(hex(hmac_sha256(bytes("Jefe"), bytes("what do ya want for nothing?"))),
              std::string("5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"));
  CHECK_EQUAL(hex(hmac_sha256(bytes(std::string(131, '\xaa')),
                              bytes("Test Using Larger Than Block-Size Key - Hash Key First"))),
              std::string("60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"));
}

TEST(a_handshake_needs_the_same_key_group_and_size) {
  const Credentials one{"key", 1, 4, 42}, zero{"key", 0, 4, 42};
  CHECK(shake(one, zero).first == HandshakeState::kDone);
  CHECK(shake(one, zero).second == HandshakeState::kDone);
  for (const Credentials& wrong :
       {Credentials{"kex", 0, 4, 42}, Credentials{"key", 0, 5, 42}, Credentials{"key", 0, 4, 43}}) {
    const auto [caller, acceptor] = shake(one, wrong);
    CHECK(acceptor == HandshakeState::kFailed);
    CHECK(caller == HandshakeState::kFailed);
  }
  CHECK(shake({"key", 9, 4, 42}, zero).second == HandshakeState::kFailed);  // a rank outside the group
}
