// Orderly ends under contention: the watch thread is woken by peers that leave while its own rank leaves.
#include "check.h"
#include "ranks.h"

using ranks::Rank;

// A ring of the doorbell that came between two looks of the watch thread was once swallowed, and the thread,
// and with it shutdown(), then slept for ever. All ranks leave at the same moment here, so that the rings
// meet.
TEST(ranks_that_leave_at_the_same_moment_all_get_away) {
  for (int round = 0; round < 40; ++round) {
    ranks::run({.size = 4}, [](Rank& r) {
      r.comm->barrier(std::chrono::milliseconds(0));
      r.comm->shutdown();
    });
  }
}
