// The messenger with a carrier: payloads between hosts that do not travel on the connections.
//
// A sender posts a payload when it has written the header that announces it, a receiver when it has read that
// header: both post in the order of one connection, which is the order that a carrier keeps. While a payload
// is under way its memory is lent, so that whoever lets go of the request waits for the end.
#include <algorithm>

#include "comm/p2p/messenger.h"

namespace mlsys::comm {
namespace {

constexpr size_t kPieceBytes = Mesh::kPieceBytes;

size_t num_pieces(size_t bytes) { return (bytes + kPieceBytes - 1) / kPieceBytes; }

// Calls `post` for each piece of a payload; `data` may be null.
template <class Post>
void cut(Piece piece, size_t bytes, Post post) {
  for (size_t left = bytes; left != 0; left -= piece.bytes) {
    piece.bytes = std::min(left, kPieceBytes);
    post(piece);
    if (piece.data != nullptr) piece.data += piece.bytes;
  }
}

}  // namespace

void Messenger::carry_out(int destination, Outbound& outbound, const std::shared_ptr<MessageState>& state) {
  state->lent = true;
  ++outbound.num_carried;
  const uint32_t number = ++num_carried_;
  carried_[number] = {destination, state, num_pieces(state->bytes)};
  cut({destination, 0, state->data, 0, number}, state->bytes,
      [&](const Piece& piece) { carrier_->post_send(piece); });
}

void Messenger::carry_in(Source& source, const std::shared_ptr<Inbound>& message) {
  ++source.num_carried;
  std::byte* target = nullptr;  // nobody wants it
  std::shared_ptr<MessageState> lent;
  if (!message->direct) {
    message->kept.resize(message->bytes);  // small, or it would have been offered first
    target = message->kept.data();
  } else if (message->receive != nullptr && message->receive->data != nullptr) {
    lent = message->receive;
    lent->lent = true;
    target = lent->data;
  }
  const uint32_t number = ++num_carried_;
  carried_[number] = {source.peer, std::move(lent), num_pieces(message->bytes), message, source.connection};
  cut({source.peer, 0, target, 0, number}, message->bytes,
      [&](const Piece& piece) { carrier_->post_receive(piece); });
}

void Messenger::move_carried(Links& links) {
  completed_.clear();
  try {
    (void)carrier_->progress(completed_);
  } catch (const Unreachable& lost) {
    Descriptor op;
    op.kind = OpKind::kSend;
    op.rank = links.topology.global(options_.rank);
    links.faults->lost(lost.peer, lost.cause, op);
  }
  for (const uint32_t number : completed_) {
    const auto found = carried_.find(number);
    if (--found->second.pieces_left != 0) continue;
    const Carried done = std::move(found->second);
    carried_.erase(found);
    if (done.lent != nullptr) done.lent->lent = false;
    if (done.incoming != nullptr) {
      for (Source& source : sources_) source.num_carried -= source.connection == done.connection;
      mailbox_.advance(done.incoming, done.incoming->bytes);
    } else {
      --outbound_[done.peer].num_carried;
      ended_.push_back({done.lent, options_.rank, nullptr});
    }
  }
}

void Messenger::end_carried(Source& source, const std::exception_ptr& error) {
  if (source.num_carried == 0) return;
  std::erase_if(carried_, [&](const auto& entry) {
    const Carried& carried = entry.second;
    if (carried.connection != source.connection) return false;
    if (carried.lent != nullptr) carried.lent->lent = false;
    mailbox_.break_off(carried.incoming, error);
    return true;
  });
  source.num_carried = 0;
  carrier_->abandon(source.peer, true);
}

void Messenger::end_carried(int destination, Outbound& outbound, const std::exception_ptr& error) {
  if (outbound.num_carried == 0) return;
  std::erase_if(carried_, [&](const auto& entry) {
    const Carried& carried = entry.second;
    if (carried.incoming != nullptr || carried.peer != destination) return false;
    carried.lent->lent = false;
    ended_.push_back({carried.lent, -1, error});
    return true;
  });
  outbound.num_carried = 0;
  carrier_->abandon(destination, false);
}

void Messenger::count_carried(Counters* counters) const {
  const std::lock_guard lock(*mutex_);
  if (carrier_ == nullptr) return;
  counters->mpi_bytes_sent += carrier_->bytes_sent();
  counters->mpi_bytes_received += carrier_->bytes_received();
}

}  // namespace mlsys::comm
