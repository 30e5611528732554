// The barrier that names the ranks which did not come, for torch's monitored_barrier.
#include <algorithm>
#include <string>

#include "bindings/comm/bodies.h"

namespace mlsys::binding {
namespace {

using comm::Communicator;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

// Above every tag of a caller, which are ints.
constexpr uint64_t kTags = uint64_t{1} << 48;

class Deadline {
 public:
  explicit Deadline(milliseconds timeout) : end_(steady_clock::now() + timeout) {}
  // Never zero, which the core would take for the group's timeout.
  milliseconds left() const {
    return std::max(milliseconds(1), std::chrono::duration_cast<milliseconds>(end_ - steady_clock::now()));
  }
  bool passed() const { return steady_clock::now() >= end_; }

 private:
  steady_clock::time_point end_;
};

// Rank 0 hears from every rank in turn; only when all have come does it answer, so no rank leaves before.
void gather_and_release(Communicator& group, uint64_t tag, bool name_all, const Deadline& deadline) {
  std::vector<char> heard(group.size());
  std::vector<std::shared_ptr<comm::Request>> arrivals;
  for (int rank = 1; rank < group.size(); ++rank) arrivals.push_back(group.recv(&heard[rank], 1, rank, tag));
  std::string missing;
  for (int rank = 1; rank < group.size() && (missing.empty() || name_all); ++rank) {
    auto& arrival = arrivals[rank - 1];
    try {
      if (deadline.passed() && !arrival->completed()) throw comm::TimedOut("too late");
      arrival->wait(deadline.left());
    } catch (const comm::TimedOut&) {
      missing += (missing.empty() ? "" : ", ") + std::to_string(rank);
    }
  }
  if (!missing.empty()) {
    throw comm::TimedOut("Rank 0 timed out in monitoredBarrier: Rank " + missing +
                         " failed to pass monitoredBarrier in time. Look at what that rank does instead.");
  }
  const char release = 1;
  std::vector<std::shared_ptr<comm::Request>> releases;
  for (int rank = 1; rank < group.size(); ++rank) releases.push_back(group.send(&release, 1, rank, tag));
  for (auto& sent : releases) sent->wait(deadline.left());
}

void arrive_and_wait(Communicator& group, uint64_t tag, const Deadline& deadline) {
  const char arrival = 1;
  char release = 0;
  const auto sent = group.send(&arrival, 1, 0, tag);
  const auto answer = group.recv(&release, 1, 0, tag);
  sent->wait(deadline.left());
  try {
    answer->wait(deadline.left());
  } catch (const comm::TimedOut&) {
    throw comm::TimedOut(
        "Rank " + std::to_string(group.rank()) +
        " successfully reached monitoredBarrier, but received no answer from rank 0: it waits for a "
        "rank that has not come, and names that rank in its own error.");
  }
}

}  // namespace

Body monitored_barrier(uint64_t number, bool name_all) {
  return [number, name_all](Communicator& group, milliseconds timeout) {
    const Deadline deadline(timeout);
    if (group.rank() == 0) {
      gather_and_release(group, kTags + number, name_all, deadline);
    } else {
      arrive_and_wait(group, kTags + number, deadline);
    }
  };
}

}  // namespace mlsys::binding
