// What goes wrong: ranks that die, leave, raise, disagree, come late, and strangers at the door.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "check.h"
#include "ranks.h"

namespace {

using mlsys::comm::ElementType;
using mlsys::comm::Mismatch;
using mlsys::comm::PeerFailed;
using mlsys::comm::Reduction;
using mlsys::comm::TimedOut;
using ranks::Rank;

constexpr std::chrono::milliseconds kDefault{0};
const Reduction kSum{ElementType::kFloat32};

// The topologies with at least three ranks, and pairs.
std::vector<ranks::Job> groups() {
  return {{.size = 2},
          {.size = 4},
          {.size = 2, .locality = {0, 1}},
          {.size = 3, .locality = {0, 1, 2}},
          {.size = 3, .locality = {0, 0, 1}},
          {.size = 4, .locality = {0, 0, 1, 1}}};
}

void all_reduce_once(Rank& r, size_t count = 1000) {
  std::vector<float> data(count, 1.0F);
  r.comm->all_reduce(data.data(), count, kSum, kDefault);
  CHECK_EQUAL(data[0], static_cast<float>(r.size));
}

// Runs `body` on a group whose rank `victim` ends differently; checks that every other rank passed its
// checks.
void survivors_pass(const ranks::Job& job, int victim, const std::function<void(Rank&)>& body) {
  const std::vector<ranks::Outcome> outcomes = ranks::run_collecting(job, body);
  for (size_t rank = 0; rank < outcomes.size(); ++rank) {
    if (static_cast<int>(rank) == victim) continue;
    if (outcomes[rank].exit_code != 0) {
      throw check::Failure("rank " + std::to_string(rank) + " of " + ranks::describe(job) + ", victim " +
                           std::to_string(victim) + ": " + outcomes[rank].error);
    }
  }
}

template <class Action>
void expect_failure_of(int culprit, const std::string& cause, Action action) {
  try {
    action();
  } catch (const PeerFailed& failure) {
    CHECK_EQUAL(failure.rank, culprit);
    if (failure.cause.find(cause) == std::string::npos) {
      check::fail(__FILE__, __LINE__, "cause \"" + failure.cause + "\" without \"" + cause + "\"");
    }
    CHECK(std::string(failure.what()).find("rank " + std::to_string(culprit)) != std::string::npos);
    return;
  }
  check::fail(__FILE__, __LINE__, "no PeerFailed");
}

// Returns when no thread of the process runs any more: SIGSTOP itself waits for none of them.
void stop(pid_t pid) {
  ::kill(pid, SIGSTOP);
  const auto runs = [](const std::filesystem::path& thread) {
    std::ifstream file(thread / "stat");
    const std::string text((std::istreambuf_iterator<char>(file)), {});
    const size_t state = text.rfind(") ");  // the name before it may hold anything
    return state != std::string::npos && text[state + 2] != 'T';
  };
  const std::string threads = "/proc/" + std::to_string(pid) + "/task";
  while (std::ranges::any_of(std::filesystem::directory_iterator(threads), runs)) ::sched_yield();
}

}  // namespace

TEST(a_killed_rank_is_named_by_every_survivor) {
  for (const ranks::Job& job : groups()) {
    for (int victim = 0; victim < job.size; ++victim) {
      survivors_pass(job, victim, [&](Rank& r) {
        all_reduce_once(r);
        ranks::meet(r, "ready");
        if (r.rank == victim) ::kill(::getpid(), SIGKILL);
        expect_failure_of(victim, "died", [&] {
          for (;;) all_reduce_once(r, 100000);
        });
        // The group stays broken, and says so at once.
        expect_failure_of(victim, "died", [&] { r.comm->barrier(kDefault); });
      });
    }
  }
}

TEST(a_killed_rank_fails_pending_receives) {
  for (const ranks::Job& job : groups()) {
    survivors_pass(job, 0, [&](Rank& r) {
      int got = 0;
      if (r.rank == 0) {
        r.comm->barrier(kDefault);
        ranks::meet(r, "ready");
        ::kill(::getpid(), SIGKILL);
      }
      const auto request = r.comm->recv(&got, sizeof(got), 0, 1);
      r.comm->barrier(kDefault);
      ranks::meet(r, "ready");
      expect_failure_of(0, "died", [&] { request->wait(kDefault); });
    });
  }
}

// The end of the connection is noticed before the death, but the death is what all survivors shall name.
TEST(a_rank_killed_in_the_middle_of_a_large_message_is_named_by_its_death) {
  for (const ranks::Job& job : groups()) {
    survivors_pass(job, 1, [&](Rank& r) {
      std::vector<std::byte> large(1 << 20);
      int small = 0;
      r.comm->barrier(kDefault);
      if (r.rank == 1) {
        const auto announced = r.comm->send(large.data(), large.size(), 0, 1);
        r.comm->send(&small, sizeof(small), 0, 2)->wait(kDefault);
        ranks::post(r, "pid", std::to_string(::getpid()));
        for (;;) ::pause();
      }
      if (r.rank != 0) return;
      r.comm->recv(&small, sizeof(small), 1, 2)->wait(kDefault);  // came after the announcement
      const auto victim = static_cast<pid_t>(std::stol(ranks::await_post(r, "pid")));
      stop(victim);  // so that the payload does not come
      const auto request = r.comm->recv(large.data(), large.size(), 1, 1);
      ::kill(victim, SIGKILL);
      expect_failure_of(1, "its process died", [&] { request->wait(kDefault); });
    });
  }
}

TEST(a_rank_that_poisons_is_named_with_its_cause) {
  for (const ranks::Job& job : groups()) {
    const int culprit = job.size - 1;
    ranks::run(job, [&](Rank& r) {
      all_reduce_once(r);
      ranks::meet(r, "ready");
      if (r.rank == culprit) {
        r.comm->poison("ValueError: bad sample");
        // Stays until the others have seen it, so that it is not its death that they see.
        for (int rank = 0; rank < culprit; ++rank) ranks::await_post(r, "seen-" + std::to_string(rank));
        return;
      }
      expect_failure_of(culprit, "bad sample", [&] { r.comm->barrier(kDefault); });
      ranks::post(r, "seen-" + std::to_string(r.rank), "x");
    });
  }
}

TEST(a_rank_that_poisons_before_the_first_operation_stops_the_others) {
  for (const ranks::Job& job : groups()) {
    ranks::run(job, [&](Rank& r) {
      if (r.rank == 0) return r.comm->poison("cannot open the data");
      expect_failure_of(0, "cannot open the data", [&] { r.comm->barrier(kDefault); });
    });
  }
}

TEST(an_exception_in_the_middle_of_an_operation_fails_the_group_on_behalf_of_its_rank) {
  ranks::run({.size = 3}, [](Rank& r) {
    constexpr size_t kCount = 30000;
    const auto data = std::static_pointer_cast<float>(r.comm->allocate(kCount * sizeof(float)));
    const std::vector<size_t> thirds{0, 10000, 20000, 30000};
    const auto on_tile = [&](const void*, size_t, size_t) {
      if (r.rank == 1) throw std::runtime_error("no room");
    };
    const auto reduce = [&] { r.comm->reduce_shard(data.get(), kCount, kSum, thirds, on_tile, kDefault); };
    if (r.rank == 1) {
      try {
        reduce();
        check::fail(__FILE__, __LINE__, "no exception");
      } catch (const std::runtime_error& error) {
        CHECK_EQUAL(std::string(error.what()), std::string("no room"));  // its own, not the group's
      }
    }
    const char* cause = "an exception ended its operation";
    expect_failure_of(1, cause, [&] {
      if (r.rank != 1) reduce();
      all_reduce_once(r);
    });
    expect_failure_of(1, cause, [&] { r.comm->barrier(kDefault); });
  });
}

TEST(a_rank_that_left_in_good_order_is_a_failure_only_for_who_waits_for_it) {
  for (const ranks::Job& job : groups()) {
    ranks::run(job, [&](Rank& r) {
      all_reduce_once(r);
      if (r.rank == 0) {
        r.comm->shutdown();
        r.comm->shutdown();
        CHECK_THROWS(std::runtime_error, r.comm->barrier(kDefault), "after it was shut down");
        ranks::post(r, "left", "x");
        for (int rank = 1; rank < job.size; ++rank) ranks::await_post(r, "done-" + std::to_string(rank));
        return;
      }
      ranks::await_post(r, "left");
      expect_failure_of(0, "left the group", [&] { r.comm->barrier(kDefault); });
      ranks::post(r, "done-" + std::to_string(r.rank), "x");
    });
  }
}

TEST(ranks_may_leave_one_after_the_other_without_a_failure) {
  for (const ranks::Job& job : groups()) {
    ranks::run(job, [&](Rank& r) {
      all_reduce_once(r);
      if (r.rank > 0) ranks::await_post(r, "left-" + std::to_string(r.rank - 1));
      if (r.rank == 0 && r.size > 2) {
        // Those who remain still exchange messages after this one has gone.
        r.comm->shutdown();
      }
      r.comm->shutdown();
      ranks::post(r, "left-" + std::to_string(r.rank), "x");
    });
  }
}

TEST(different_operations_are_a_mismatch_on_every_rank) {
  for (const ranks::Job& job : groups()) {
    const int odd = job.size - 1;
    ranks::run(job, [&](Rank& r) {
      all_reduce_once(r);
      ranks::meet(r, "the first operation is over");
      std::vector<float> data(64);
      const std::string expected = "ranks disagree about the operation";
      if (r.rank == odd) {
        CHECK_THROWS(Mismatch, r.comm->broadcast(data.data(), 256, 0, kDefault),
                     "rank " + std::to_string(odd) + " called broadcast number 2");
      } else {
        CHECK_THROWS(Mismatch, r.comm->all_reduce(data.data(), 64, kSum, kDefault), expected);
      }
    });
  }
}

TEST(different_sizes_types_reductions_and_roots_are_mismatches) {
  const auto expect_mismatch = [](const std::function<void(Rank&, float*)>& body) {
    for (const ranks::Job& job : {ranks::Job{.size = 2}, ranks::Job{.size = 2, .locality = {0, 1}}}) {
      ranks::run(job, [&](Rank& r) {
        std::vector<float> data(64);
        CHECK_THROWS(Mismatch, body(r, data.data()), "rank 1 called");
      });
    }
  };
  expect_mismatch([](Rank& r, float* d) { r.comm->all_reduce(d, r.rank == 0 ? 10 : 11, kSum, kDefault); });
  expect_mismatch([](Rank& r, float* d) {
    r.comm->all_reduce(d, 4, {r.rank == 0 ? ElementType::kFloat32 : ElementType::kInt32}, kDefault);
  });
  expect_mismatch([](Rank& r, float* d) {
    using mlsys::comm::ReduceOp;
    r.comm->all_reduce(d, 4, {ElementType::kFloat32, r.rank == 0 ? ReduceOp::kSum : ReduceOp::kMax},
                       kDefault);
  });
  expect_mismatch([](Rank& r, float* d) { r.comm->broadcast(d, 16, r.rank, kDefault); });
}

TEST(all_to_all_with_sizes_that_do_not_fit_is_a_mismatch) {
  for (const ranks::Job& job : {ranks::Job{.size = 2}, ranks::Job{.size = 2, .locality = {0, 1}}}) {
    ranks::run(job, [](Rank& r) {
      std::vector<char> in(100), out(100);
      const std::vector<const void*> inputs{in.data(), in.data()};
      const std::vector<void*> outputs{out.data(), out.data() + 50};
      std::vector<size_t> sends{5, 5}, receives{5, 5};
      if (r.rank == 0) sends[1] = 6;
      // Between hosts the receiver finds it, and the sender may have left the call by then.
      const auto calls = [&] {
        r.comm->all_to_all(inputs, sends, outputs, receives, kDefault);
        r.comm->barrier(kDefault);
      };
      CHECK_THROWS(Mismatch, calls(), "rank 0 sent 6 bytes to rank 1, which expected 5");
    });
  }
}

TEST(a_rank_that_does_not_come_is_named_by_the_timeout) {
  for (const ranks::Job& job : groups()) {
    ranks::run(job, [&](Rank& r) {
      all_reduce_once(r);
      if (r.rank == 0) {
        for (int rank = 1; rank < job.size; ++rank) ranks::await_post(r, "done-" + std::to_string(rank));
        ranks::post(r, "all-done", "x");
        return;
      }
      float one = 1;
      CHECK_THROWS(TimedOut, r.comm->all_reduce(&one, 1, kSum, std::chrono::milliseconds(100)),
                   "timed out in all_reduce number 2");
      ranks::post(r, "done-" + std::to_string(r.rank), "x");
      ranks::await_post(r, "all-done");  // leaving earlier would be what the others see
    });
  }
}

TEST(wrong_arguments_are_refused_before_anything_is_published) {
  ranks::run({.size = 2}, [](Rank& r) {
    int values[4] = {};
    CHECK_THROWS(std::invalid_argument, r.comm->broadcast(values, 4, 2, kDefault),
                 "root 2 is not in a group of size 2");
    CHECK_THROWS(std::invalid_argument,
                 r.comm->all_reduce(values, 4, {ElementType::kInt32, mlsys::comm::ReduceOp::kAvg}, kDefault),
                 "avg of int32");
    CHECK_THROWS(std::invalid_argument, r.comm->send(values, 4, 5, 0), "destination 5");
    CHECK_THROWS(std::invalid_argument, r.comm->all_gather(values, {}, 4, kDefault), "0 outputs were given");
    all_reduce_once(r);
  });
}

TEST(a_rank_with_another_job_key_is_refused) {
  for (ranks::Job job : {ranks::Job{.size = 2, .timeout = std::chrono::seconds(2)},
                         ranks::Job{.size = 2, .locality = {0, 1}, .timeout = std::chrono::seconds(2)}}) {
    const std::vector<ranks::Outcome> outcomes = ranks::run_collecting(job, [&](Rank& r) {
      mlsys::comm::Options options;
      options.rank = r.rank;
      options.size = 2;
      options.group_name = "other";
      options.timeout = job.timeout;
      options.locality = job.locality;
      options.job_key = r.rank == 0 ? "right" : "wrong";
      mlsys::comm::Communicator::create(ranks::file_store(r.folder), options)->barrier(kDefault);
    });
    for (const ranks::Outcome& outcome : outcomes) CHECK_EQUAL(outcome.exit_code, 1);
  }
}

TEST(strangers_on_the_data_sockets_do_not_disturb_the_job) {
  ranks::run({.size = 3, .locality = {0, 1, 2}}, [](Rank& r) {
    all_reduce_once(r);
    // Rank 2 plays the stranger against everyone's listeners, whose ports are in the store's files.
    std::vector<int> strangers;
    if (r.rank == 2) {
      for (int rank = 0; rank < 3; ++rank) {
        std::ifstream file(r.folder + "/mlsys_test_address_" + std::to_string(rank));
        std::string host, data_port, message_port;
        std::getline(file, host, '|');
        std::getline(file, data_port, '|');
        std::getline(file, message_port, '|');
        for (const std::string& port : {data_port, message_port}) {
          for (int kind = 0; kind < 4; ++kind) {
            const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
            sockaddr_in address{};
            address.sin_family = AF_INET;
            address.sin_port = htons(static_cast<uint16_t>(std::stoi(port)));
            CHECK_EQUAL(::inet_pton(AF_INET, host.c_str(), &address.sin_addr), 1);
            CHECK_EQUAL(::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
            const std::string garbage(kind == 1 ? 3 : 5000, kind == 3 ? '\0' : 'x');
            if (kind != 0)
              CHECK(::send(fd, garbage.data(), garbage.size(), MSG_NOSIGNAL) > 0);  // kind 0 says nothing
            strangers.push_back(fd);
          }
        }
      }
    }
    for (int i = 0; i < 10; ++i) all_reduce_once(r, 50000);
    int value = r.rank, got = -1;
    const auto sent = r.comm->send(&value, sizeof(value), (r.rank + 1) % 3, 1);
    r.comm->recv(&got, sizeof(got), (r.rank + 2) % 3, 1)->wait(kDefault);
    CHECK_EQUAL(got, (r.rank + 2) % 3);
    sent->wait(kDefault);
    r.comm->barrier(kDefault);
    for (const int fd : strangers) ::close(fd);
  });
}

// A data-loader worker: forked from a rank, it may go away by a normal exit, and may outlive a killed rank.
TEST(a_forked_child_neither_ends_the_group_nor_hides_its_parents_death) {
  for (const ranks::Job& job : {ranks::Job{.size = 2}, ranks::Job{.size = 2, .locality = {0, 1}}}) {
    survivors_pass(job, 0, [](Rank& r) {
      all_reduce_once(r);
      const pid_t child = ::fork();
      if (child == 0) {
        bool refused = false;
        try {
          r.comm->barrier(kDefault);
        } catch (const std::runtime_error&) {
          refused = true;
        }
        r.comm->poison("not the rank itself");
        r.comm.reset();
        ::_exit(refused ? 0 : 1);
      }
      int status = -1;
      CHECK_EQUAL(::waitpid(child, &status, 0), child);
      CHECK_EQUAL(status, 0);
      all_reduce_once(r);
      ranks::meet(r, "ready");
      if (r.rank == 0) {
        const pid_t orphan = ::fork();
        if (orphan == 0) {
          ranks::await_post(r, "seen");  // outlives its parent and the check below
          ::_exit(0);
        }
        ::kill(::getpid(), SIGKILL);
      }
      expect_failure_of(0, "died", [&] { r.comm->barrier(kDefault); });
      ranks::post(r, "seen", "x");
    });
  }
}
