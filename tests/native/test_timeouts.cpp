// Who is named when an operation times out, and how a failure spreads between hosts when ranks have left.
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "check.h"
#include "ranks.h"

namespace {

using mlsys::comm::ElementType;
using mlsys::comm::PeerFailed;
using mlsys::comm::Reduction;
using mlsys::comm::TimedOut;
using ranks::Rank;

constexpr std::chrono::milliseconds kDefault{0};
constexpr std::chrono::milliseconds kShort{200};
const Reduction kSum{ElementType::kFloat32};

void all_reduce(Rank& r, std::chrono::milliseconds timeout) {
  std::vector<float> data(10000, 1.0F);
  r.comm->all_reduce(data.data(), data.size(), kSum, timeout);
}

std::string timeout_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const TimedOut& timeout) {
    return timeout.what();
  }
  check::fail(__FILE__, __LINE__, "no TimedOut");
}

void expect_text(const std::string& text, const std::string& part) {
  if (text.find(part) == std::string::npos) {
    check::fail(__FILE__, __LINE__, "\"" + text + "\" without \"" + part + "\"");
  }
}

std::vector<ranks::Job> layouts() {
  return {{.size = 3}, {.size = 3, .locality = {0, 1, 2}}, {.size = 3, .locality = {0, 0, 1}}};
}

}  // namespace

TEST(a_timeout_names_who_is_missing_and_what_it_did_last_also_between_hosts) {
  for (const ranks::Job& job : layouts()) {
    ranks::run(job, [](Rank& r) {
      all_reduce(r, kDefault);
      if (r.rank == 1) {
        r.comm->barrier(kDefault);
        for (const int rank : {0, 2}) ranks::await_post(r, "done-" + std::to_string(rank));
        // It comes too late, and is told that the group went on without it.
        expect_text(timeout_of([&] { all_reduce(r, kDefault); }), "this rank is out of the group");
        return;
      }
      r.comm->barrier(kDefault);
      const std::string text = timeout_of([&] { all_reduce(r, kShort); });
      expect_text(text, "timed out in all_reduce number 3");
      expect_text(text, "waiting for rank 1.");
      expect_text(text, "Not arrived: rank 1 last called barrier number 2.");
      ranks::post(r, "done-" + std::to_string(r.rank), "x");
    });
  }
}

TEST(a_stopped_rank_is_named_and_finds_itself_out_of_the_group_when_it_goes_on) {
  for (const ranks::Job& job : layouts()) {
    ranks::run(job, [](Rank& r) {
      all_reduce(r, kDefault);
      if (r.rank == 1) {
        ranks::post(r, "pid", std::to_string(::getpid()));
        ::kill(::getpid(), SIGSTOP);
        expect_text(timeout_of([&] { all_reduce(r, kDefault); }), "this rank is out of the group");
        return;
      }
      const pid_t stopped = std::stoi(ranks::await_post(r, "pid"));
      const std::string text = timeout_of([&] { all_reduce(r, kShort); });
      expect_text(text, "waiting for rank 1.");
      ranks::post(r, "done-" + std::to_string(r.rank), "x");
      for (const int rank : {0, 2}) ranks::await_post(r, "done-" + std::to_string(rank));
      if (r.rank == 0) CHECK_EQUAL(::kill(stopped, SIGCONT), 0);
    });
  }
}

TEST(after_a_stop_in_the_middle_of_a_message_between_hosts_every_later_call_says_the_same) {
  ranks::run({.size = 2, .locality = {0, 1}}, [](Rank& r) {
    all_reduce(r, kDefault);
    std::vector<float> large(size_t{32} << 20, 1.0F);
    if (r.rank == 1) {
      ranks::post(r, "pid", std::to_string(::getpid()));
      expect_text(timeout_of([&] { r.comm->all_reduce(large.data(), large.size(), kSum, kDefault); }),
                  "this rank is out of the group");
      return;
    }
    const pid_t other = std::stoi(ranks::await_post(r, "pid"));
    std::atomic<bool> over{false};
    std::thread stopper([&] {
      while (!over && r.comm->counters().tcp_bytes_received < size_t{1} << 20) std::this_thread::yield();
      ::kill(other, SIGSTOP);
    });
    const std::string first = timeout_of(
        [&] { r.comm->all_reduce(large.data(), large.size(), kSum, std::chrono::milliseconds(500)); });
    over = true;
    stopper.join();
    const std::string second = timeout_of([&] { all_reduce(r, kDefault); });
    const std::string third = timeout_of([&] { r.comm->barrier(kDefault); });
    CHECK_EQUAL(::kill(other, SIGCONT), 0);
    expect_text(first, "timed out in all_reduce number 2");
    expect_text(first, "waiting for rank 1. No answer: rank 1.");
    const size_t received = r.comm->counters().tcp_bytes_received;
    CHECK(received >= size_t{1} << 20 && received < large.size() * sizeof(float));
    CHECK_EQUAL(second, first);
    CHECK_EQUAL(third, first);
  });
}

TEST(a_late_message_tells_of_a_stopped_rank) {
  for (const ranks::Job& job : layouts()) {
    ranks::run(job, [](Rank& r) {
      all_reduce(r, kDefault);
      int got = 0;
      if (r.rank == 1) {
        ranks::post(r, "pid", std::to_string(::getpid()));
        ::kill(::getpid(), SIGSTOP);
        expect_text(timeout_of([&] { r.comm->recv(&got, sizeof(got), 0, 1)->wait(kDefault); }),
                    "this rank is out of the group");
        return;
      }
      const pid_t stopped = std::stoi(ranks::await_post(r, "pid"));
      expect_text(timeout_of([&] { r.comm->recv(&got, sizeof(got), 1, 1)->wait(kShort); }), "rank 1");
      ranks::post(r, "done-" + std::to_string(r.rank), "x");
      for (const int rank : {0, 2}) ranks::await_post(r, "done-" + std::to_string(rank));
      if (r.rank == 0) CHECK_EQUAL(::kill(stopped, SIGCONT), 0);
    });
  }
}

// Between hosts every rank is heard by somebody on each other host, not only the first of its host.
TEST(a_death_is_told_to_other_hosts_also_when_the_first_rank_of_its_host_has_left) {
  const std::vector<ranks::Outcome> outcomes =
      ranks::run_collecting({.size = 4, .locality = {0, 0, 1, 1}}, [](Rank& r) {
        all_reduce(r, kDefault);
        int got = 0;
        if (r.rank == 0) {
          r.comm->shutdown();
          ranks::post(r, "left", "x");
          return;
        }
        ranks::await_post(r, "left");
        if (r.rank == 1) {
          for (const int rank : {2, 3}) ranks::await_post(r, "waiting-" + std::to_string(rank));
          ::kill(::getpid(), SIGKILL);
        }
        const auto request = r.comm->recv(&got, sizeof(got), 1, 1);
        ranks::post(r, "waiting-" + std::to_string(r.rank), "x");
        try {
          request->wait(std::chrono::seconds(20));
        } catch (const PeerFailed& failure) {
          CHECK_EQUAL(failure.rank, 1);
          expect_text(failure.cause, "died");
          return;
        }
        check::fail(__FILE__, __LINE__, "no PeerFailed");
      });
  for (const int rank : {0, 2, 3}) {
    const ranks::Outcome& outcome = outcomes[static_cast<size_t>(rank)];
    if (outcome.exit_code != 0) throw check::Failure(outcome.error);
  }
}
