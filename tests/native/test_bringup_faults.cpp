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

// A store in which this process stops when it has published its `kind` of key (or is about to).
class StoppingStore final : public mlsys::comm::Store {
 public:
  StoppingStore(std::shared_ptr<mlsys::comm::Store> inner, std::string kind, bool after)
      : inner_(std::move(inner)), kind_("/" + kind + "/"), after_(after) {}
  void set(const std::string& key, const std::vector<uint8_t>& value) override {
    const bool hit = key.find(kind_) != std::string::npos;
    if (hit && !after_) ::kill(::getpid(), SIGSTOP);
    inner_->set(key, value);
    if (hit && after_) ::kill(::getpid(), SIGSTOP);
  }
  std::vector<uint8_t> get(const std::string& key, std::chrono::milliseconds timeout) override {
    return inner_->get(key, timeout);
  }

 private:
  std::shared_ptr<mlsys::comm::Store> inner_;
  std::string kind_;
  bool after_;
};

// A store whose server stops answering once this rank has published its `kind` of key, until "answer" is
// posted.
class SilentStore final : public mlsys::comm::Store {
 public:
  SilentStore(std::shared_ptr<mlsys::comm::Store> inner, std::string kind, Rank rank)
      : inner_(std::move(inner)), kind_("/" + kind + "/"), rank_(std::move(rank)) {}
  void set(const std::string& key, const std::vector<uint8_t>& value) override {
    answer();
    inner_->set(key, value);
    silent_ |= key.find(kind_) != std::string::npos;
  }
  std::vector<uint8_t> get(const std::string& key, std::chrono::milliseconds timeout) override {
    answer();
    return inner_->get(key, timeout);
  }

 private:
  void answer() const {
    if (silent_) ranks::await_post(rank_, "answer");
  }

  std::shared_ptr<mlsys::comm::Store> inner_;
  std::string kind_;
  Rank rank_;
  bool silent_ = false;
};

mlsys::comm::Options doomed(const Rank& r, const ranks::Job& job) {
  mlsys::comm::Options options;
  options.rank = r.rank;
  options.size = r.size;
  options.group_name = "doomed";
  options.timeout = job.timeout;
  options.locality = job.locality;
  options.job_key = job.job_key;
  return options;
}

// Connects, which must time out in words that include `expected`.
void expect_timeout(std::shared_ptr<mlsys::comm::Store> store, const mlsys::comm::Options& options,
                    const std::string& expected) {
  const auto comm = Communicator::create(std::move(store), options);
  try {
    comm->connect(options.timeout);
  } catch (const mlsys::comm::TimedOut& late) {
    if (std::string(late.what()).find(expected) != std::string::npos) return;
    throw check::Failure("expected \"" + expected + "\": " + late.what());
  }
  throw check::Failure("the group connected");
}

struct Stage {
  const char* kind;
  bool after;
};

// Every survivor throws PeerFailed, and at least one names the victim: a rank that fails because of the
// victim dies of it too, and may be what the others see first.
void expect_death_noticed(const ranks::Job& job, int victim, Stage stage) {
  const std::vector<ranks::Outcome> outcomes = ranks::run_collecting(job, [&](Rank& r) {
    const mlsys::comm::Options options = doomed(r, job);
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

// Rank 1 has all the time in the world, so it can only have heard of it from rank 0, over which it waits.
TEST(a_rank_that_is_stopped_while_its_host_connects_is_named_by_all_and_told_that_it_is_out) {
  for (const bool after : {false, true}) {
    const ranks::Job job{.size = 3, .timeout = std::chrono::milliseconds(600)};
    ranks::run(job, [&](Rank& r) {
      mlsys::comm::Options options = doomed(r, job);
      std::shared_ptr<mlsys::comm::Store> store = ranks::file_store(r.folder);
      if (r.rank == 2) {
        ranks::post(r, "victim", std::to_string(::getpid()));
        return expect_timeout(std::make_shared<StoppingStore>(store, "joined", after), options,
                              "this rank is out of the group");
      }
      if (r.rank == 1) options.timeout = kOperation;
      expect_timeout(store, options, "rank 2 is stopped");
      ranks::post(r, "raised-" + std::to_string(r.rank), "x");
      if (r.rank == 1) return;
      ranks::await_post(r, "raised-1");
      ::kill(std::stoi(ranks::await_post(r, "victim")), SIGCONT);
    });
  }
}

TEST(a_store_that_stops_answering_costs_the_timeout_and_is_told_when_it_answers_again) {
  const ranks::Job job{.size = 2, .timeout = std::chrono::milliseconds(600)};
  ranks::run(job, [&](Rank& r) {
    const mlsys::comm::Options options = doomed(r, job);
    std::shared_ptr<mlsys::comm::Store> store = ranks::file_store(r.folder);
    if (r.rank == 1) {
      ranks::post(r, "victim", std::to_string(::getpid()));
      return expect_timeout(std::make_shared<StoppingStore>(store, "joined", false), options,
                            "this rank is out of the group");
    }
    expect_timeout(std::make_shared<SilentStore>(store, "joined", r), options, "rank 1 is stopped");
    ranks::post(r, "answer", "x");
    ::kill(std::stoi(ranks::await_post(r, "victim")), SIGCONT);
    store->get("mlsys/doomed/failed", kPatience);
  });
}

TEST(a_stopped_rank_that_nobody_continues_does_not_outlive_its_test) {
  const std::vector<ranks::Outcome> outcomes = ranks::run_collecting({.size = 2}, [](Rank& r) {
    if (r.rank == 1) ::kill(::getpid(), SIGSTOP);
    if (r.rank == 0) throw std::runtime_error("failed early");
  });
  CHECK_EQUAL(outcomes[0].error, "failed early");
  CHECK_EQUAL(outcomes[1].signal, SIGKILL);
}
