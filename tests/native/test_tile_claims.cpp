// Claims of tiles, by teams in threads of one process that share one control block (so that the thread
// sanitizer sees all of their memory).
#include <array>
#include <atomic>
#include <memory>
#include <thread>

#include "check.h"
#include "comm/local/tile_claims.h"

namespace {

using namespace mlsys::comm;

// The ranks of a host without bring-up.
class Host {
 public:
  explicit Host(int size)
      : fd_(ControlBlock::make(size, size)), block_(std::make_unique<ControlBlock>(fd_, size, size)) {
    for (int rank = 0; rank < size; ++rank) {
      auto& t = topologies_.emplace_back(std::make_unique<Topology>());
      t->rank = rank;
      t->size = size;
      t->hosts.emplace_back();
      for (int member = 0; member < size; ++member) {
        t->members.push_back({member, "here", 0});
        t->hosts[0].push_back(member);
      }
      index_hosts(*t);
      std::vector<mlsys::UniqueFd> doorbells;
      for (int local = 0; local < size; ++local) doorbells.push_back(make_eventfd());
      faults_.push_back(std::make_unique<Faults>(*t, *block_, std::move(doorbells)));
      teams_.push_back(std::make_unique<LocalTeam>(*t, *block_, *faults_.back(),
                                                   std::vector<std::byte*>(static_cast<size_t>(size)),
                                                   std::vector<size_t>(static_cast<size_t>(size))));
    }
  }
  LocalTeam& team(int rank) { return *teams_[static_cast<size_t>(rank)]; }

  // Runs body(rank, team) on a thread for each rank and throws what the first of them threw.
  template <class Body>
  void run(Body body) {
    std::vector<std::thread> threads;
    std::vector<std::exception_ptr> thrown(teams_.size());
    for (size_t rank = 0; rank < teams_.size(); ++rank) {
      threads.emplace_back([&, rank] {
        try {
          body(static_cast<int>(rank), *teams_[rank]);
        } catch (...) {
          thrown[rank] = std::current_exception();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::exception_ptr& error : thrown) {
      if (error) std::rethrow_exception(error);
    }
  }

 private:
  mlsys::UniqueFd fd_;
  std::unique_ptr<ControlBlock> block_;
  std::vector<std::unique_ptr<Topology>> topologies_;
  std::vector<std::unique_ptr<Faults>> faults_;
  std::vector<std::unique_ptr<LocalTeam>> teams_;
};

void begin(LocalTeam& team, uint64_t sequence, std::chrono::milliseconds timeout = std::chrono::seconds(60)) {
  Descriptor call;
  call.kind = OpKind::kAllReduce;
  call.rank = team.index();
  call.sequence = sequence;
  team.arrive(call, Clock::now() + timeout);
  team.await_arrival();
}

}  // namespace

TEST(every_tile_is_done_once_in_every_operation_and_phase) {
  constexpr size_t kTiles = 37;
  constexpr int kOperations = 50;
  Host host(3);
  // Plain memory on purpose: the sanitizer would tell if a tile could be done by two ranks, or be read before
  // it is complete.
  std::array<int, kTiles> times_done{};
  host.run([&](int, LocalTeam& team) {
    for (int op = 1; op <= kOperations; ++op) {
      begin(team, static_cast<uint64_t>(op));
      for (size_t phase = 0; phase < 2; ++phase) {
        TileClaims claims(team, phase, kTiles);
        claims.run([&](size_t tile) { ++times_done[tile]; });
        // Between operations: nobody begins the next phase's tiles before all have looked.
        for (const int times : times_done) CHECK_EQUAL(times, 2 * (op - 1) + static_cast<int>(phase) + 1);
        team.barrier();
      }
    }
  });
}

TEST(a_rank_that_takes_no_tile_holds_nobody_up) {
  constexpr size_t kTiles = 8;
  Host host(2);
  std::atomic<size_t> num_done{0};
  host.run([&](int rank, LocalTeam& team) {
    begin(team, 1);
    TileClaims claims(team, 0, kTiles);
    // Rank 1 is away until rank 0 has returned from the whole work.
    if (rank == 1) num_done.wait(0);
    claims.run([&](size_t) { CHECK_EQUAL(rank, 0); });
    if (rank == 0) {
      num_done = kTiles;
      num_done.notify_all();
    }
  });
}

TEST(a_rank_that_stops_inside_a_tile_is_named_by_the_timeout) {
  Host host(3);
  std::atomic<bool> taken{false}, told{false};
  host.run([&](int rank, LocalTeam& team) {
    begin(team, 1, std::chrono::milliseconds(rank == 0 ? 2000 : 60000));  // rank 0 must get past the arrival
    TileClaims claims(team, 0, 1);
    size_t tile = 0;
    if (rank == 2) {
      CHECK(claims.take(&tile));
      taken = true;
      taken.notify_all();
      told.wait(false);
      return claims.finish();
    }
    taken.wait(false);
    if (rank == 1) return;
    CHECK(!claims.take(&tile));
    CHECK_THROWS(TimedOut, claims.await_all(), "waiting for rank 2");
    told = true;
    told.notify_all();
  });
}

TEST(no_tiles_are_complete_at_once) {
  Host host(2);
  host.run([](int, LocalTeam& team) {
    begin(team, 1);
    TileClaims claims(team, 0, 0);
    claims.run([](size_t) { CHECK(false); });
  });
}
