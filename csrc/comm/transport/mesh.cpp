#include "comm/transport/mesh.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace mlsys::comm {
namespace {

// Tries before sleeping in poll(): data from a busy peer is usually a few microseconds away.
constexpr int kNumTries = 20;
// Of one call, before the peer is taken for lost.
constexpr int kMostCalls = 20;
constexpr std::chrono::milliseconds kBetweenCalls{50};

}  // namespace

Mesh::Mesh(const Topology& topology, const Faults& faults, const Credentials& credentials,
           Strangers& strangers, std::vector<TcpAddress> addresses, UniqueFd listening, int sockets_per_peer,
           std::shared_ptr<Carrier> brought)
    : topology_(topology),
      faults_(faults),
      credentials_(credentials),
      addresses_(std::move(addresses)),
      acceptor_(std::in_place, std::move(listening), credentials, strangers),
      sockets_per_peer_(sockets_per_peer),
      sockets_(sockets_per_peer),
      brought_(std::move(brought)) {}

void Mesh::begin(const Descriptor& op, Clock::time_point deadline) {
  if (num_unfinished_ !=
      0) {  // our own mistake: an operation ends with all of it moved, or the group has failed
    throw std::logic_error(describe(op) + " began before the messages of " + describe(op_) + " had moved");
  }
  op_ = op;
  deadline_ = deadline;
  remaining_.clear();
  greeter_ = -1;
}

int Mesh::poll_timeout_ms(int at_most_ms) const {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline_ - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, at_most_ms));
}

bool Mesh::connected(int peer, Purpose purpose) const {
  if (purpose == Purpose::kControl) return control_.contains(peer);
  return brought_ != nullptr || sockets_.connected(peer);
}

void Mesh::ensure(std::span<const int> peers, Purpose purpose, const std::function<bool(int)>& is_dead) {
  std::vector<Call> calls;
  std::vector<int> missing;
  for (const int peer : peers) {
    // The next and the previous host may be the same one.
    if (peer == topology_.rank || connected(peer, purpose)) continue;
    if (std::find(missing.begin(), missing.end(), peer) != missing.end()) continue;
    missing.push_back(peer);
    if (peer > topology_.rank) continue;
    const int num_lanes = purpose == Purpose::kControl ? 1 : sockets_per_peer_;
    for (int lane = 0; lane < num_lanes; ++lane) calls.push_back({peer, lane, std::nullopt});
  }
  for (Call& call : calls) dial(call, purpose);
  const auto have = [&](int peer) { return connected(peer, purpose); };
  while (std::erase_if(missing, have), !missing.empty()) {
    std::vector<pollfd> polls{{faults_.abort_fd(), POLLIN, 0}};
    acceptor_->append_polls(polls);
    int limit_ms =
        is_dead ? std::min(poll_timeout_ms(kLongestSleepMs), 20) : poll_timeout_ms(kLongestSleepMs);
    for (const Call& call : calls) {
      if (call.handshake) {
        const bool writing = call.handshake->wants_to_write();
        polls.push_back({call.handshake->fd(), static_cast<short>(writing ? POLLOUT : POLLIN), 0});
      } else {
        limit_ms = std::min(limit_ms, 10);
      }
    }
    carrier_in_use().append_polls(polls);
    if (::poll(polls.data(), polls.size(), limit_ms) < 0 && errno != EINTR) throw_errno("poll");
    faults_.check();
    progress();  // the greeting: who called something else does not connect
    serve_acceptor();
    std::erase_if(calls, [&](Call& call) { return progress(call, purpose, is_dead); });
    std::erase_if(missing, have);
    for (const int peer : missing) {
      if (faults_.has_left(peer)) faults_.fail_left(peer, op_);
      if (is_dead && is_dead(peer))
        faults_.fail_dead(peer, "its process died while the group was connecting", op_);
    }
    if (!missing.empty() && Clock::now() >= deadline_) faults_.give_up(missing, op_);
  }
}

void Mesh::dial(Call& call, Purpose purpose) const {
  ++call.num_tries;
  try {
    call.handshake.emplace(Handshake::call(connect_tcp(addresses_[static_cast<size_t>(call.peer)]),
                                           credentials_, purpose, call.peer, call.lane));
  } catch (const std::system_error& error) {  // refused at once: nobody listens there any more
    faults_.lost(call.peer, error.what(), op_);
  }
}

bool Mesh::progress(Call& call, Purpose purpose, const std::function<bool(int)>& is_dead) {
  if (!call.handshake) {
    if (Clock::now() >= call.again_at) dial(call, purpose);
    return false;
  }
  const HandshakeState state = call.handshake->step();
  if (state == HandshakeState::kUnderWay) return false;
  if (state == HandshakeState::kDone) {
    add_socket(call.peer, purpose, call.lane, call.handshake->take_fd());
    return true;
  }
  if (is_dead && is_dead(call.peer))
    faults_.fail_dead(call.peer, "its process died while the group was connecting", op_);
  const std::string why = call.handshake->failure();
  if (call.handshake->refused() || call.num_tries >= kMostCalls) {
    faults_.lost(call.peer,
                 "the TCP connection to it was refused (" + why + "); all ranks need the same MLSYS_JOB_KEY",
                 op_);
  }
  call.handshake.reset();
  call.again_at = Clock::now() + kBetweenCalls;
  return false;
}

Socket Mesh::take_control(int peer) {
  Socket socket = std::move(control_.at(peer));
  control_.erase(peer);
  return socket;
}

void Mesh::tell_controls(std::span<const uint8_t> bytes) const {
  for (const auto& [peer, socket] : control_) {
    // Who is gone already needs no news.
    (void)::send(socket.fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  }
}

// A second connection of a rank that is already connected can only be a confused job: the first one stays.
void Mesh::add_socket(int peer, Purpose purpose, int lane, UniqueFd fd) {
  Socket socket(std::move(fd));
  if (purpose == Purpose::kControl) control_.try_emplace(peer, std::move(socket));
  if (purpose == Purpose::kData) sockets_.attach(peer, lane, std::move(socket));
}

void Mesh::serve_acceptor() {
  for (Acceptor::Peer& peer : acceptor_->progress()) {
    add_socket(peer.rank, peer.purpose, peer.lane, std::move(peer.fd));
  }
}

template <class Post>
Mesh::Message Mesh::post_pieces(Piece piece, size_t bytes, Post post) {
  const auto message = static_cast<Message>(remaining_.size());
  remaining_.push_back(static_cast<uint32_t>((bytes + kPieceBytes - 1) / kPieceBytes));
  if (bytes != 0) ++num_unfinished_;
  piece.message = message;
  for (size_t left = bytes; left != 0; left -= piece.bytes, ++piece.lane, piece.data += kPieceBytes) {
    piece.bytes = std::min(left, kPieceBytes);
    post(piece);
  }
  return message;
}

Mesh::Message Mesh::post(const Outgoing& outgoing) {
  auto* data = const_cast<std::byte*>(static_cast<const std::byte*>(outgoing.data));
  return post_pieces({outgoing.peer, outgoing.lane, data}, outgoing.bytes,
                     [this](const Piece& piece) { carrier_in_use().post_send(piece); });
}

Mesh::Message Mesh::post(const Incoming& incoming) {
  return post_pieces({incoming.peer, incoming.lane, static_cast<std::byte*>(incoming.data)}, incoming.bytes,
                     [this](const Piece& piece) { carrier_in_use().post_receive(piece); });
}

bool Mesh::progress() {
  completed_.clear();
  bool moved = false;
  try {
    moved = carrier_in_use().progress(completed_);
  } catch (const Unreachable& lost) {
    faults_.lost(lost.peer, lost.cause, op_);
  }
  for (const Message message : completed_) {
    if (--remaining_[message] == 0) --num_unfinished_;
  }
  if (greeter_ >= 0 && done(greeting_)) check_greeting();
  return moved;
}

bool Mesh::step(int at_most_ms) {
  if (progress()) {
    num_fruitless_ = 0;
    return true;
  }
  if (++num_fruitless_ > kNumTries) {
    num_fruitless_ = 0;
    wait(at_most_ms);
  }
  return false;
}

void Mesh::wait(int at_most_ms) {
  std::vector<pollfd> polls{{faults_.abort_fd(), POLLIN, 0}};
  carrier_in_use().append_polls(polls);
  const size_t num_data = polls.size();
  acceptor_->append_polls(polls);
  const int at_most = std::min(at_most_ms, carrier_in_use().longest_sleep_ms());
  if (::poll(polls.data(), polls.size(), poll_timeout_ms(at_most)) < 0 && errno != EINTR) throw_errno("poll");
  const auto acted = [](const pollfd& p) { return p.revents != 0; };
  const auto first = polls.begin() + 1, strangers = polls.begin() + static_cast<ptrdiff_t>(num_data);
  // What has come is taken first: a failure of the next operation must not end this one, if it can finish.
  // A carrier without descriptors is asked once more, since it could not end the sleep.
  if (first == strangers && progress()) return;
  if (std::none_of(first, strangers, acted)) faults_.check();
  if (std::any_of(strangers, polls.end(), acted)) serve_acceptor();
  // Who knocks at the door does not put off the deadline.
  if (std::none_of(polls.begin(), strangers, acted) && Clock::now() >= deadline_)
    faults_.give_up(carrier_in_use().awaited(), op_);
}

void Mesh::finish() {
  while (num_unfinished_ != 0) step();
}

void Mesh::transfer(std::span<const Outgoing> sends, std::span<const Incoming> receives) {
  const auto first = static_cast<Message>(remaining_.size());
  for (const Outgoing& send : sends) post(send);
  for (const Incoming& receive : receives) post(receive);
  const auto last = static_cast<Message>(remaining_.size());
  for (Message message = first; message < last; ++message) {
    while (!done(message)) step();
  }
}

void Mesh::greet(int next, int previous) {
  post(Outgoing{next, &op_, sizeof(op_)});
  greeting_ = post(Incoming{previous, &greeted_, sizeof(greeted_)});
  greeter_ = previous;
}

// Each leader compares its own call with the previous host's: unless all are equal, some neighbours differ.
void Mesh::check_greeting() {
  const int greeter = greeter_;
  greeter_ = -1;
  if (!is_plausible(greeted_)) {
    faults_.fail_mismatch("what came from rank " + std::to_string(topology_.global(greeter)) +
                              " is no operation header: the ranks are out of step in " + describe(op_) + ".",
                          op_);
  }
  if (!same_operation(op_, greeted_)) faults_.fail_mismatch(describe_mismatch(op_, greeted_), op_);
}

void Mesh::close() {
  acceptor_.reset();
  carrier_in_use().close();
  control_.clear();
}

}  // namespace mlsys::comm
