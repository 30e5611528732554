#include "bindings/comm/mpi_carrier.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <type_traits>

namespace mlsys::binding {
namespace {

using std::chrono::milliseconds;

// Most pieces have no more (Mesh::kPieceBytes). Memory that is not touched costs nothing.
constexpr size_t kBufferBytes = 512 << 10;
// After so long without movement the waits begin to sleep.
constexpr milliseconds kBusy{1};
// How long a carrier that closes in the middle of transfers waits for their end.
constexpr milliseconds kFarewell{200};

template <class Handle>
Handle as_handle(uint64_t value) {
  if constexpr (std::is_pointer_v<Handle>) {
    return reinterpret_cast<Handle>(static_cast<uintptr_t>(value));
  } else {
    return static_cast<Handle>(static_cast<uint32_t>(value));
  }
}

}  // namespace

// Their buffers stay until MPI has let go of them, which the next carrier that closes finds out. Never
// destroyed, because some requests never end: those of a rank that died in the middle.
template <class Handle>
struct MpiCarrier<Handle>::Graveyard {
  std::mutex mutex;
  std::vector<Transfer> transfers;
};

template <class Handle>
typename MpiCarrier<Handle>::Graveyard& MpiCarrier<Handle>::graveyard() {
  static auto* of_process = new Graveyard;
  return *of_process;
}

template <class Handle>
MpiCarrier<Handle>::MpiCarrier(const MpiJob& job, int first_tag, int num_lanes)
    : mpi_(find_mpi_functions<Handle>(job.extension)),
      communicator_(as_handle<Handle>(job.communicator)),
      byte_type_(as_handle<Handle>(job.byte_type)),
      ranks_(job.ranks),
      first_tag_(first_tag),
      num_lanes_(num_lanes),
      owner_(::getpid()) {}

template <class Handle>
void MpiCarrier<Handle>::expect_success(int result, const char* call, int peer) const {
  if (result == 0) return;
  char text[8192] = "";
  int length = 0;
  (void)mpi_.error_string(result, text, &length);
  throw comm::Unreachable{peer, std::string(call) + " failed: " + text};
}

template <class Handle>
typename MpiCarrier<Handle>::Buffer MpiCarrier<Handle>::take_buffer(size_t bytes) {
  if (!free_.empty() && free_.back().bytes >= bytes) {
    Buffer buffer = std::move(free_.back());  // the last one used is the warmest
    free_.pop_back();
    return buffer;
  }
  const size_t size = std::max(bytes, kBufferBytes);
  return {std::make_unique_for_overwrite<std::byte[]>(size), size};
}

template <class Handle>
typename MpiCarrier<Handle>::Lane& MpiCarrier<Handle>::lane_of(const comm::Piece& piece) {
  const int lane = piece.lane % num_lanes_;
  return lanes_.try_emplace({piece.peer, lane}, Lane{piece.peer, first_tag_ + lane, {}, {}}).first->second;
}

template <class Handle>
void MpiCarrier<Handle>::post_send(const comm::Piece& piece) {
  moved_at_ = Clock::now();
  lane_of(piece).out.waiting.push_back(piece);
}

template <class Handle>
void MpiCarrier<Handle>::post_receive(const comm::Piece& piece) {
  moved_at_ = Clock::now();
  lane_of(piece).in.waiting.push_back(piece);
}

template <class Handle>
void MpiCarrier<Handle>::start_sends(Lane& lane) {
  Direction& out = lane.out;
  for (; !out.waiting.empty() && out.under_way.size() < kWindow; out.waiting.pop_front()) {
    const comm::Piece& piece = out.waiting.front();
    Transfer transfer{{}, take_buffer(piece.bytes), piece};
    std::memcpy(transfer.buffer.data.get(), piece.data, piece.bytes);
    expect_success(mpi_.isend(transfer.buffer.data.get(), static_cast<int>(piece.bytes), byte_type_,
                              mpi_rank(piece.peer), lane.tag, communicator_, &transfer.request),
                   "MPI_Isend", piece.peer);
    out.under_way.push_back(std::move(transfer));
  }
}

template <class Handle>
void MpiCarrier<Handle>::start_receives(Lane& lane) {
  Direction& in = lane.in;
  for (; !in.waiting.empty() && in.under_way.size() < kWindow; in.waiting.pop_front()) {
    const comm::Piece& piece = in.waiting.front();
    Transfer transfer{{}, take_buffer(piece.bytes), piece};
    expect_success(mpi_.irecv(transfer.buffer.data.get(), static_cast<int>(piece.bytes), byte_type_,
                              mpi_rank(piece.peer), lane.tag, communicator_, &transfer.request),
                   "MPI_Irecv", piece.peer);
    in.under_way.push_back(std::move(transfer));
  }
}

template <class Handle>
bool MpiCarrier<Handle>::is_done(Transfer& transfer) const {
  int done = 0;
  MpiStatus status;
  expect_success(mpi_.test(&transfer.request, &done, &status), "MPI_Test", transfer.piece.peer);
  return done != 0;
}

template <class Handle>
bool MpiCarrier<Handle>::finish_sends(Direction& out, std::vector<uint32_t>& completed) {
  bool any = false;
  for (; !out.under_way.empty() && is_done(out.under_way.front()); out.under_way.pop_front(), any = true) {
    Transfer& sent = out.under_way.front();
    bytes_sent_.fetch_add(sent.piece.bytes, std::memory_order_relaxed);
    if (!sent.abandoned) completed.push_back(sent.piece.message);
    free_.push_back(std::move(sent.buffer));
  }
  return any;
}

template <class Handle>
bool MpiCarrier<Handle>::finish_receives(Direction& in, std::vector<uint32_t>& completed) {
  bool any = false;
  for (; !in.under_way.empty() && is_done(in.under_way.front()); in.under_way.pop_front(), any = true) {
    Transfer& got = in.under_way.front();
    bytes_received_.fetch_add(got.piece.bytes, std::memory_order_relaxed);
    if (got.piece.data != nullptr) std::memcpy(got.piece.data, got.buffer.data.get(), got.piece.bytes);
    if (!got.abandoned) completed.push_back(got.piece.message);
    free_.push_back(std::move(got.buffer));
  }
  return any;
}

template <class Handle>
bool MpiCarrier<Handle>::progress(std::vector<uint32_t>& completed) {
  bool moved = false;
  for (auto& [key, lane] : lanes_) {
    start_receives(lane);
    start_sends(lane);
    moved |= finish_sends(lane.out, completed);
    moved |= finish_receives(lane.in, completed);
  }
  if (moved) {
    moved_at_ = Clock::now();
  } else {
    (void)::sched_yield();  // the rank that it waits for may be on this core
  }
  return moved;
}

// MPI has no descriptor to poll and moves nothing unless it is called, so waits are busy at first.
template <class Handle>
int MpiCarrier<Handle>::longest_sleep_ms() const {
  return Clock::now() - moved_at_ < kBusy ? 0 : 1;
}

template <class Handle>
std::vector<int> MpiCarrier<Handle>::awaited() const {
  std::vector<int> ranks;
  for (const auto& [key, lane] : lanes_) {
    if (lane.out.idle() && lane.in.idle()) continue;
    if (ranks.empty() || ranks.back() != lane.peer) ranks.push_back(lane.peer);
  }
  return ranks;
}

template <class Handle>
void MpiCarrier<Handle>::abandon(int peer, bool incoming) {
  for (auto& [key, lane] : lanes_) {
    if (lane.peer != peer) continue;
    Direction& direction = incoming ? lane.in : lane.out;
    direction.waiting.clear();
    for (Transfer& transfer : direction.under_way) {
      transfer.piece.data = nullptr;
      transfer.abandoned = true;
    }
  }
}

// In good order nothing is under way any more.
template <class Handle>
void MpiCarrier<Handle>::close() {
  std::vector<Transfer> left;
  const bool usable = may_call();
  for (auto& [key, lane] : lanes_) {
    // A receive that nothing has come for ends by this; a send can only wait for its receiver.
    for (Transfer& receive : lane.in.under_way) {
      if (usable) (void)mpi_.cancel(&receive.request);
      left.push_back(std::move(receive));
    }
    for (Transfer& send : lane.out.under_way) left.push_back(std::move(send));
  }
  lanes_.clear();
  free_.clear();
  if (!left.empty()) bury(std::move(left));
}

// Waits a moment for the ends of the requests and keeps the memory of the others.
template <class Handle>
void MpiCarrier<Handle>::bury(std::vector<Transfer> left) {
  Graveyard& dead = graveyard();
  const std::lock_guard lock(dead.mutex);
  std::move(left.begin(), left.end(), std::back_inserter(dead.transfers));
  if (!may_call()) return;
  const auto has_ended = [&](Transfer& transfer) {
    int done = 0;
    MpiStatus status;
    return mpi_.test(&transfer.request, &done, &status) == 0 && done != 0;
  };
  const auto deadline = Clock::now() + kFarewell;
  while (std::erase_if(dead.transfers, has_ended), !dead.transfers.empty() && Clock::now() < deadline) {
    (void)::sched_yield();
  }
}

// Not after MPI_Finalize, nor in a forked child.
template <class Handle>
bool MpiCarrier<Handle>::may_call() const {
  int finalized = 0;
  return ::getpid() == owner_ && mpi_.finalized(&finalized) == 0 && finalized == 0;
}

template class MpiCarrier<int>;
template class MpiCarrier<void*>;

}  // namespace mlsys::binding
