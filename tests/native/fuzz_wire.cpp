// Fuzz target for everything that parses bytes from a wire or from the store: greetings, operation headers,
// control frames, message headers, identities, and a whole handshake against an acceptor.
//
// LLVMFuzzerTestOneInput is libFuzzer's entry (clang -fsanitize=fuzzer -DMLSYS_LIBFUZZER). Without libFuzzer
// the main below drives it from a seeded corpus: valid inputs of every kind, then random mutations of them.
//   fuzz_wire [runs] [seed]
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "comm/auth/handshake.h"
#include "comm/bringup/identity.h"
#include "comm/fault/control_frame.h"
#include "comm/operation.h"
#include "comm/p2p/mailbox.h"

namespace {

using namespace mlsys::comm;
using Bytes = std::vector<uint8_t>;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "fuzz_wire: %s\n", what);
  std::abort();
}

// What decodes must encode to the same bytes again, where the format has no room for variation.
void parse(std::span<const uint8_t> data) {
  if (const auto hello = decode_hello(data)) {
    const auto again = encode(*hello);
    expect(std::equal(again.begin(), again.end(), data.begin()), "a greeting changed");
    expect(hello->rank >= 0 && hello->rank < hello->size, "a greeting's rank is out of range");
  }
  if (const auto frame = decode_control_frame(data, 8)) {
    expect(frame->poison.cause.size() < PoisonRecord::kCauseBytes, "a cause is too long");
    using Type = ControlFrame::Type;
    const bool names_a_rank = frame->type != Type::kPoison && frame->type != Type::kAsk;
    expect(!names_a_rank || (frame->rank >= 0 && frame->rank < 8), "bad rank");
    expect(frame->notice.size() < Notice::kBytes, "a notice is too long");
  }
  if (const auto header = decode_message_header(data)) {
    const auto again = encode(*header);
    expect(std::equal(again.begin(), again.end(), data.begin()), "a message header changed");
  }
  if (const auto identity = decode_identity(data)) {
    const Bytes again = encode(*identity);
    expect(Bytes(data.begin(), data.end()) == again, "an identity changed");
  }
  if (data.size() >= sizeof(Descriptor)) {
    Descriptor descriptor;
    std::memcpy(&descriptor, data.data(), sizeof(descriptor));
    if (is_plausible(descriptor)) expect(!describe(descriptor).empty(), "an operation has no name");
  }
}

// The bytes as a stranger's side of a handshake: it must never be let in, and must never block or crash.
void knock(std::span<const uint8_t> data) {
  int ends[2];
  expect(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0,
         "socketpair failed");
  const mlsys::UniqueFd stranger(ends[1]);
  Handshake handshake = Handshake::accept(mlsys::UniqueFd(ends[0]), {"the job's key", 0, 4, 42});
  for (size_t at = 0; at < data.size();) {
    const size_t n = std::min<size_t>(data.size() - at, 1 + data[at] % 64);
    if (::send(stranger.get(), data.data() + at, n, MSG_NOSIGNAL) < 0) break;
    at += n;
    if (handshake.step() != HandshakeState::kUnderWay) break;
  }
  expect(handshake.step() != HandshakeState::kDone, "a stranger was let in");
}

// The bytes as a script for the mailbox: receives posted and messages arriving in any order.
void deliver(std::span<const uint8_t> data) {
  Mailbox mailbox(0, [](int rank) { return rank; });
  std::vector<std::vector<std::byte>> buffers;
  std::vector<std::shared_ptr<Inbound>> inbound;
  for (size_t i = 0; i + 1 < data.size() && i < 400; i += 2) {
    const size_t bytes = data[i + 1] % 50;
    const uint64_t tag = data[i] % 3;
    const int source = data[i] / 4 % 3;
    if (data[i] % 2 == 0) {
      buffers.emplace_back(bytes);
      mailbox.post(std::make_shared<MessageState>(MessageState::Direction::kReceive, buffers.back().data(),
                                                  bytes, data[i] % 8 == 0 ? -1 : source, tag));
    } else {
      const bool large = data[i] % 16 == 5;
      const MessageHeader header{large ? MessageHeader::Kind::kOffer : MessageHeader::Kind::kEager, tag,
                                 bytes, i, 0};
      if (large) (void)mailbox.offer(source, header, 1 + i % 2);
      if (!large) inbound.push_back(mailbox.begin(source, header));
    }
    for (const auto& claimed : mailbox.take_claimed()) {
      if (claimed->receive != nullptr && claimed->bytes != 0) inbound.push_back(claimed);
    }
    for (const auto& message : inbound) {
      if (message->received == message->bytes) continue;
      const std::span<std::byte> room = mailbox.room(*message, 1 + data[i + 1] % 7);
      std::fill(room.begin(), room.end(), std::byte{1});
      mailbox.advance(message, room.size());
    }
  }
  mailbox.end_all(nullptr);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  parse({data, size});
  knock({data, size});
  deliver({data, size});
  return 0;
}

#ifndef MLSYS_LIBFUZZER
namespace {

template <class Encoded>
Bytes bytes_of(const Encoded& encoded) {
  return Bytes(encoded.begin(), encoded.end());
}

std::vector<Bytes> corpus() {
  Hello hello{Purpose::kData, 1, 4, 42, {}};
  Identity identity;
  identity.host = "a-host";
  identity.socket_name = "mlsys-1-x";
  Descriptor descriptor;
  descriptor.kind = OpKind::kAllReduce;
  Bytes raw(sizeof(descriptor));
  std::memcpy(raw.data(), &descriptor, sizeof(descriptor));
  Bytes greeting_and_proof = bytes_of(encode(hello));
  greeting_and_proof.resize(greeting_and_proof.size() + 36, 7);
  const Poison poison{PoisonKind::kPeerFailed, 3, 1234, 9, "host", "op", "cause"};
  return {{},
          raw,
          greeting_and_proof,
          bytes_of(encode(hello)),
          bytes_of(encode(identity)),
          bytes_of(encode(poison_frame(poison))),
          bytes_of(encode(left_frame(2))),
          bytes_of(encode(dead_frame(2))),
          bytes_of(encode(standing_frame(3, {Standing::State::kStopped, descriptor}))),
          bytes_of(encode(notice_frame(1, "host 127.0.0.1 port 4"))),
          bytes_of(encode(MessageHeader{MessageHeader::Kind::kEager, 7, 1000, 0, 0})),
          bytes_of(encode(MessageHeader{MessageHeader::Kind::kInArena, 7, 1 << 20, 3, 4096}))};
}

void mutate(Bytes& bytes, std::mt19937& random) {
  for (unsigned change = random() % 8; change > 0; --change) {
    const unsigned kind = random() % 4;
    if (kind == 0 || bytes.empty()) {
      bytes.insert(bytes.begin() + static_cast<ptrdiff_t>(random() % (bytes.size() + 1)),
                   static_cast<uint8_t>(random()));
    } else if (kind == 1) {
      bytes.erase(bytes.begin() + static_cast<ptrdiff_t>(random() % bytes.size()));
    } else if (kind == 2) {
      bytes[random() % bytes.size()] = static_cast<uint8_t>(random());
    } else {
      bytes[random() % bytes.size()] ^= static_cast<uint8_t>(1U << random() % 8);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int runs = argc > 1 ? std::atoi(argv[1]) : 50000;
  std::mt19937 random(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 1);
  const std::vector<Bytes> seeds = corpus();
  for (const Bytes& seed : seeds) LLVMFuzzerTestOneInput(seed.data(), seed.size());
  for (int run = 0; run < runs; ++run) {
    Bytes bytes = seeds[random() % seeds.size()];
    mutate(bytes, random);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::printf("%d inputs parsed\n", runs + static_cast<int>(seeds.size()));
}
#endif
