// Messages: matching, order, sizes, any source, both transports, life after the request.
#include <atomic>
#include <cstring>
#include <fstream>
#include <numeric>
#include <thread>

#include "check.h"
#include "ranks.h"

namespace {

using mlsys::comm::Communicator;
using mlsys::comm::Mismatch;
using mlsys::comm::TimedOut;
using ranks::Rank;

constexpr std::chrono::milliseconds kDefault{0};

std::vector<ranks::Job> pairs() { return {{.size = 2}, {.size = 2, .locality = {0, 1}}}; }

std::vector<int> numbers(size_t count, int first) {
  std::vector<int> values(count);
  std::iota(values.begin(), values.end(), first);
  return values;
}

size_t resident_bytes() {
  size_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident * 4096;
}

}  // namespace

TEST(messages_of_every_size_arrive_whole) {
  for (const ranks::Job& job : pairs()) {
    ranks::run(job, [](Rank& r) {
      for (const size_t count : {0, 1, 3, 1000, 300000, 3000001}) {
        std::vector<int> data = numbers(count, r.rank);
        std::vector<int> got(count);
        const auto sent = r.comm->send(data.data(), count * sizeof(int), 1 - r.rank, 7);
        const auto received = r.comm->recv(got.data(), count * sizeof(int), 1 - r.rank, 7);
        received->wait(kDefault);
        sent->wait(kDefault);
        CHECK(got == numbers(count, 1 - r.rank));
        CHECK_EQUAL(received->source_rank(), 1 - r.rank);
      }
    });
  }
}

TEST(messages_match_by_tag_and_keep_their_order) {
  for (const ranks::Job& job : pairs()) {
    ranks::run(job, [](Rank& r) {
      if (r.rank == 0) {
        std::vector<std::shared_ptr<mlsys::comm::Request>> requests;
        std::vector<int> values = numbers(40, 0);
        for (int i = 0; i < 40; ++i)
          requests.push_back(
              r.comm->send(&values[static_cast<size_t>(i)], sizeof(int), 1, static_cast<uint64_t>(i % 2)));
        for (const auto& request : requests) request->wait(kDefault);
      } else {
        for (const uint64_t tag :
             {uint64_t{1}, uint64_t{0}}) {  // the later tag first: those of tag 0 are kept
          for (int i = 0; i < 20; ++i) {
            int got = -1;
            r.comm->recv(&got, sizeof(got), 0, tag)->wait(kDefault);
            CHECK_EQUAL(got, 2 * i + static_cast<int>(tag));
          }
        }
      }
      r.comm->barrier(kDefault);
    });
  }
}

TEST(a_receive_from_any_source_says_who_sent) {
  ranks::run({.size = 4, .locality = {0, 0, 1, 1}}, [](Rank& r) {
    if (r.rank == 0) {
      int sum = 0;
      for (int i = 0; i < 3; ++i) {
        int got = -1;
        const auto request = r.comm->recv(&got, sizeof(got), Communicator::kAnySource, 5);
        request->wait(kDefault);
        CHECK_EQUAL(got, request->source_rank() * 100);
        sum += got;
      }
      CHECK_EQUAL(sum, 600);
    } else {
      const int value = r.rank * 100;
      r.comm->send(&value, sizeof(value), 0, 5)->wait(kDefault);
    }
    r.comm->barrier(kDefault);
  });
}

TEST(a_rank_may_send_to_itself) {
  ranks::run({.size = 1}, [](Rank& r) {
    const std::vector<int> data = numbers(100000, 3);
    std::vector<int> got(data.size());
    const auto received = r.comm->recv(got.data(), got.size() * sizeof(int), 0, 1);
    r.comm->send(data.data(), data.size() * sizeof(int), 0, 1)->wait(kDefault);
    received->wait(kDefault);
    CHECK(got == data);
  });
}

TEST(a_small_send_completes_although_the_receiver_only_runs_collectives) {
  for (const ranks::Job& job : pairs()) {
    ranks::run(job, [](Rank& r) {
      float one = 1;
      const std::vector<int> data = numbers(16384, 0);  // 64 KiB, the most that goes unasked
      if (r.rank == 0) r.comm->send(data.data(), data.size() * sizeof(int), 1, 9)->wait(kDefault);
      r.comm->all_reduce(&one, 1, {mlsys::comm::ElementType::kFloat32}, kDefault);
      CHECK_EQUAL(one, 2.0F);
      if (r.rank == 1) {
        std::vector<int> got(data.size());
        r.comm->recv(got.data(), got.size() * sizeof(int), 0, 9)->wait(kDefault);
        CHECK(got == data);
      }
    });
  }
}

TEST(a_large_message_stays_with_its_sender_until_somebody_asks) {
  for (const ranks::Job& job : pairs()) {
    ranks::run(job, [](Rank& r) {
      constexpr size_t kCount = 16 << 20;  // 64 MiB
      const std::vector<int> data = r.rank == 0 ? numbers(kCount, 5) : std::vector<int>();
      const int last = 7;
      std::shared_ptr<mlsys::comm::Request> large;
      r.comm->barrier(kDefault);
      const size_t before = resident_bytes();
      if (r.rank == 0) {
        large = r.comm->send(data.data(), kCount * sizeof(int), 1, 9);
        r.comm->send(&last, sizeof(last), 1, 10)->wait(kDefault);
      } else {
        int got = 0;
        r.comm->recv(&got, sizeof(got), 0, 10)->wait(kDefault);  // so the offer is here, too
        CHECK_EQUAL(got, last);
        CHECK(resident_bytes() - before < (8 << 20));
      }
      r.comm->barrier(kDefault);
      if (r.rank == 0) {
        CHECK(!large->completed());
        ranks::post(r, "seen", "x");
        large->wait(kDefault);
      } else {
        ranks::await_post(r, "seen");
        std::vector<int> got(kCount);
        r.comm->recv(got.data(), kCount * sizeof(int), 0, 9)->wait(kDefault);
        CHECK(got == numbers(kCount, 5));
      }
    });
  }
}

TEST(large_messages_from_the_arena_arrive_whole_and_in_order) {
  for (const ranks::Job& job : pairs()) {
    ranks::run(job, [](Rank& r) {
      constexpr size_t kCount = 200000;
      const std::shared_ptr<void> memory = r.comm->allocate(3 * kCount * sizeof(int));
      auto* values = static_cast<int*>(memory.get());
      std::iota(values, values + 3 * kCount, 0);
      std::vector<std::shared_ptr<mlsys::comm::Request>> requests;
      std::vector<int> got(3 * kCount);
      for (size_t part = 0; part < 3; ++part) {
        const size_t bytes = kCount * sizeof(int);
        if (r.rank == 0) {
          requests.push_back(r.comm->send(values + part * kCount, bytes, 1, 4));
        } else {
          requests.push_back(r.comm->recv(got.data() + part * kCount, bytes, 0, 4));
        }
      }
      for (const auto& request : requests) request->wait(kDefault);
      if (r.rank == 1) CHECK(got == numbers(3 * kCount, 0));
      r.comm->barrier(kDefault);
    });
  }
}

TEST(a_large_receive_of_another_size_is_a_mismatch_and_ends_the_send) {
  for (const ranks::Job& job : pairs()) {
    ranks::run(job, [](Rank& r) {
      std::vector<int> data = numbers(50000, 0);
      if (r.rank == 0) {
        r.comm->send(data.data(), 200000, 1, 1)->wait(kDefault);
        r.comm->send(data.data(), 160000, 1, 1)->wait(kDefault);
      } else {
        std::vector<int> got(50000);
        const auto wrong = r.comm->recv(got.data(), 199996, 0, 1);
        CHECK_THROWS(Mismatch, wrong->wait(kDefault),
                     "rank 0 sent 200000 bytes to rank 1, which expected 199996.");
        r.comm->recv(got.data(), 160000, 0, 1)->wait(kDefault);
        CHECK_EQUAL(got[39999], 39999);
      }
      r.comm->barrier(kDefault);
    });
  }
}

TEST(a_receive_of_another_size_is_a_mismatch_and_the_next_message_is_intact) {
  for (const ranks::Job& job : pairs()) {
    ranks::run(job, [](Rank& r) {
      std::vector<int> data = numbers(8, 0);
      if (r.rank == 0) {
        r.comm->send(data.data(), 8 * sizeof(int), 1, 1)->wait(kDefault);
        r.comm->send(data.data(), 4 * sizeof(int), 1, 1)->wait(kDefault);
      } else {
        std::vector<int> got(8);
        const auto wrong = r.comm->recv(got.data(), 5 * sizeof(int), 0, 1);
        CHECK_THROWS(Mismatch, wrong->wait(kDefault), "rank 0 sent 32 bytes to rank 1, which expected 20.");
        r.comm->recv(got.data(), 4 * sizeof(int), 0, 1)->wait(kDefault);
        CHECK_EQUAL(got[3], 3);
      }
      r.comm->barrier(kDefault);
    });
  }
}

TEST(a_receive_that_nobody_answers_times_out) {
  ranks::run({.size = 2}, [](Rank& r) {
    int got = 0;
    if (r.rank == 0) {
      const auto request = r.comm->recv(&got, sizeof(got), 1, 3);
      CHECK_THROWS(TimedOut, request->wait(std::chrono::milliseconds(50)), "a receive from group rank 1");
    }
    r.comm->barrier(kDefault);
  });
}

TEST(abandoned_requests_neither_lose_messages_nor_write_into_freed_memory) {
  for (const ranks::Job& job : pairs()) {
    ranks::run(job, [](Rank& r) {
      if (r.rank == 0) {
        auto data = std::make_unique<std::vector<int>>(numbers(500000, 1));
        r.comm->send(data->data(), data->size() * sizeof(int), 1, 1);  // the request is dropped at once
        data.reset();
        const int second = 2;
        r.comm->send(&second, sizeof(second), 1, 1)->wait(kDefault);
      } else {
        auto buffer = std::make_unique<std::vector<int>>(500000);
        r.comm->recv(buffer->data(), buffer->size() * sizeof(int), 0, 1);
        buffer.reset();
        int got = 0;
        r.comm->recv(&got, sizeof(got), 0, 1)->wait(kDefault);
        CHECK_EQUAL(got, 2);
      }
      r.comm->barrier(kDefault);
    });
  }
}

TEST(what_runs_before_completion_is_over_when_wait_returns) {
  ranks::run({.size = 2}, [](Rank& r) {
    for (int round = 0; round < 200; ++round) {
      int value = round;
      if (r.rank == 1) {
        r.comm->send(&value, sizeof(value), 0, 1)->wait(kDefault);
        continue;
      }
      const auto received = r.comm->recv(&value, sizeof(value), 1, 1);
      std::atomic<bool> over = false;
      received->before_completion([&](bool succeeded) {
        CHECK(succeeded);
        for (int turn = 0; turn < 50; ++turn) std::this_thread::yield();
        over = true;
      });
      received->wait(kDefault);
      CHECK(over.load());
    }
  });
}

TEST(callbacks_run_once_on_completion_or_at_once_when_late) {
  ranks::run({.size = 2}, [](Rank& r) {
    int value = r.rank, got = -1;
    std::atomic<int> calls{0};
    const auto sent = r.comm->send(&value, sizeof(value), 1 - r.rank, 1);
    const auto received = r.comm->recv(&got, sizeof(got), 1 - r.rank, 1);
    received->on_completion([&] { ++calls; });
    received->wait(kDefault);
    sent->wait(kDefault);
    r.comm->barrier(kDefault);
    sent->on_completion([&] { ++calls; });
    r.comm->shutdown();  // joins the progress thread: the first callback has run
    CHECK_EQUAL(calls.load(), 2);
  });
}
