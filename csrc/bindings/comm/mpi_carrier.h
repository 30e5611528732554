// Pieces over MPI: each is one message of our own communicator. A lane is a tag, because MPI lets no message
// overtake another of the same ranks, communicator and tag. At most kWindow pieces of a lane are in MPI's
// hands each way.
//
// MPI gets no memory of ours but the carrier's own buffers. It may write into a receive, and read from a
// send, until the request is complete; a send cannot be cancelled everywhere, and any thread's call of MPI
// moves it. So when an operation fails in the middle, its memory could not be freed. Buffers that stay the
// same also stay registered with the network card.
//
// Needs MPI_THREAD_MULTIPLE: carriers of several groups, and the program itself, call MPI at the same time.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <map>

#include "bindings/comm/mpi_job.h"
#include "comm/transport/carrier.h"

namespace mlsys::binding {

template <class Handle>
class MpiCarrier final : public comm::Carrier {
 public:
  MpiCarrier(const MpiJob& job, int first_tag, int num_lanes);
  ~MpiCarrier() override { close(); }

  void post_send(const comm::Piece& piece) override;
  void post_receive(const comm::Piece& piece) override;
  bool progress(std::vector<uint32_t>& completed) override;
  void append_polls(std::vector<pollfd>&) const override {}
  int longest_sleep_ms() const override;
  std::vector<int> awaited() const override;
  void abandon(int peer, bool incoming) override;
  void close() override;

  const char* name() const override { return "MPI"; }
  uint64_t bytes_sent() const override { return bytes_sent_.load(std::memory_order_relaxed); }
  uint64_t bytes_received() const override { return bytes_received_.load(std::memory_order_relaxed); }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr size_t kWindow = 8;

  struct Buffer {
    std::unique_ptr<std::byte[]> data;
    size_t bytes = 0;
  };
  // A piece in MPI's hands.
  struct Transfer {
    Handle request;
    Buffer buffer;
    comm::Piece piece;
    bool abandoned = false;
  };
  struct Direction {
    std::deque<Transfer> under_way;
    std::deque<comm::Piece> waiting;  // for room in the window
    bool idle() const { return under_way.empty() && waiting.empty(); }
  };
  // Between this rank and another.
  struct Lane {
    int peer, tag;
    Direction out, in;
  };
  // Requests that a closed carrier could not bring to an end; see bury().
  struct Graveyard;

  static Graveyard& graveyard();
  Lane& lane_of(const comm::Piece& piece);
  void start_sends(Lane& lane);
  void start_receives(Lane& lane);
  // Takes off what is done at the head of the queue; true when there was any.
  bool finish_sends(Direction& out, std::vector<uint32_t>& completed);
  bool finish_receives(Direction& in, std::vector<uint32_t>& completed);
  bool is_done(Transfer& transfer) const;
  void expect_success(int result, const char* call, int peer) const;
  int mpi_rank(int peer) const { return ranks_[static_cast<size_t>(peer)]; }
  Buffer take_buffer(size_t bytes);
  void bury(std::vector<Transfer> left);
  bool may_call() const;

  const MpiFunctions<Handle> mpi_;
  const Handle communicator_, byte_type_;
  const std::vector<int> ranks_;
  const int first_tag_, num_lanes_;
  const pid_t owner_;
  std::map<std::pair<int, int>, Lane> lanes_;  // by peer and lane
  std::vector<Buffer> free_;
  Clock::time_point moved_at_{};  // when anything moved or was posted last
  std::atomic<uint64_t> bytes_sent_{0}, bytes_received_{0};
};

}  // namespace mlsys::binding
