// Ranks that die while the group connects, and how soon a death is noticed afterwards. Operations have half
// an hour here, so whoever finishes learned of the death itself and not of a timeout.
#include <signal.h>
#include <unistd.h>

#include "check.h"
#include "ranks.h"

namespace {

using mlsys::comm::Communicator;
using mlsys::comm::PeerFailed;
using ranks::Rank;

constexpr std::chrono::minutes kOperation{30};
constexpr std::chrono::seconds kPatience{20};

// A store in which this process ends when it is about to publish, or has published, its `kind` of key.
class DeadlyStore final : public mlsys::comm::Store {
 public:
  DeadlyStore(std::shared_ptr<mlsys::comm::Store> inner, std::string kind, bool after)
      : inner_(std::move(inner)), kind_("/" + kind + "/"), after_(after) {}
  void set(const std::string& key, const std::vector<uint8_t>& value) override {
    const bool hit = key.find(kind_) != std::string::npos;
    if (hit && !after_) ::kill(::getpid(), SIGKILL);
    inner_->set(key, value);
    if (hit) ::kill(::getpid(), SIGKILL);
  }
  std::vector<uint8_t> get(const std::string& key, std::chrono::milliseconds timeout) override {
    return inner_->get(key, timeout);
  }

 private:
  std::shared_ptr<mlsys::comm::Store> inner_;
  std::string kind_;
  bool after_;
};

struct Stage {
  const char* kind;
  bool after;
};

// Every survivor throws PeerFailed, and at least one names the victim: a rank that fails because of the
// victim dies of it too, and may be what the others see first.
void expect_death_noticed(const ranks::Job& job, int victim, Stage stage) {
  const std::vector<ranks::Outcome> outcomes = ranks::run_collecting(job, [&](Rank& r) {
    mlsys::comm::Options options;
    options.rank = r.rank;
    options.size = r.size;
    options.group_name = "doomed";
    options.timeout = job.timeout;
    options.locality = job.locality;
    options.job_key = job.job_key;
    std::shared_ptr<mlsys::comm::Store> store = ranks::file_store(r.folder);
    if (r.rank == victim) store = std::make_shared<DeadlyStore>(store, stage.kind, stage.after);
    const auto comm = Communicator::create(store, options);
    try {
      comm->barrier(std::chrono::milliseconds(0));
    } catch (const PeerFailed& failure) {
      throw std::runtime_error("PeerFailed " + std::to_string(failure.rank));
    }
  });
  bool named = false;
  for (int rank = 0; rank < job.size; ++rank) {
    const ranks::Outcome& outcome = outcomes[static_cast<size_t>(rank)];
    if (rank == victim) {
      CHECK_EQUAL(outcome.signal, SIGKILL);
      continue;
    }
    if (outcome.error.rfind("PeerFailed", 0) != 0) {
      throw check::Failure("rank " + std::to_string(rank) + " of " + ranks::describe(job) + ", victim " +
                           std::to_string(victim) + (stage.after ? " after " : " before ") + stage.kind +
                           ": " + outcome.error);
    }
    named |= outcome.error == "PeerFailed " + std::to_string(victim);
  }
  CHECK(named);
}

}  // namespace

TEST(a_rank_killed_while_the_group_connects_is_noticed_at_every_stage) {
  for (const ranks::Job& job : {ranks::Job{.size = 2, .timeout = kOperation},
                                ranks::Job{.size = 3, .locality = {0, 0, 1}, .timeout = kOperation}}) {
    for (int victim = 0; victim < job.size; ++victim) {
      for (const Stage stage : {Stage{"identity", true}, Stage{"joined", false}, Stage{"joined", true}}) {
        expect_death_noticed(job, victim, stage);
      }
      if (job.locality.empty()) continue;
      for (const bool after : {false, true}) expect_death_noticed(job, victim, {"address", after});
    }
  }
}

TEST(a_death_is_noticed_long_before_the_timeout_of_the_operation) {
  for (ranks::Job job : {ranks::Job{.size = 2}, ranks::Job{.size = 3, .locality = {0, 1, 2}},
                         ranks::Job{.size = 4, .locality = {0, 0, 1, 1}}}) {
    job.timeout = kOperation;
    const int victim = job.size - 1;
    const std::vector<ranks::Outcome> outcomes = ranks::run_collecting(job, [&](Rank& r) {
      r.comm->barrier(kPatience);
      ranks::meet(r, "ready");
      if (r.rank == victim) ::kill(::getpid(), SIGKILL);
      try {
        r.comm->barrier(kPatience);  // a timeout would throw TimedOut, and fail the test
      } catch (const PeerFailed& failure) {
        CHECK_EQUAL(failure.rank, victim);
        return;
      }
      throw check::Failure("the barrier did not fail");
    });
    for (int rank = 0; rank < victim; ++rank) {
      const ranks::Outcome& outcome = outcomes[static_cast<size_t>(rank)];
      if (outcome.exit_code != 0) throw check::Failure(ranks::describe(job) + ": " + outcome.error);
    }
  }
}
