// Timings of the core alone: all-reduce of 16 MiB over each path against a ceiling, and latencies. Prints
// the least and the median of interleaved rounds. The ceiling is every rank sweeping (reading and writing)
// its own buffer at once with memcpy into itself: copying half of the buffer onto the other half twice reads
// and writes as many bytes as the least that an all-reduce must move.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "check.h"
#include "ranks.h"

namespace {

using Clock = std::chrono::steady_clock;
using mlsys::comm::ElementType;
using ranks::Rank;

struct Times {
  double least, median;
};

template <class Body>
double once_us(Rank& r, Body body) {
  r.comm->barrier({});
  const auto start = Clock::now();
  body();
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

Times times_of(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  return {samples.front(), samples[samples.size() / 2]};
}

void large(Rank& r, const char* path, bool arena) {
  const size_t count = size_t{4} << 20;
  std::vector<float> own(arena ? 0 : count);
  const auto block = arena ? r.comm->allocate(count * sizeof(float)) : std::shared_ptr<void>();
  float* data = arena ? static_cast<float*>(block.get()) : own.data();
  std::fill(data, data + count, 0.0F);
  auto* bytes = reinterpret_cast<char*>(data);
  const size_t half = count * sizeof(float) / 2;
  std::vector<double> reduce_us, sweep_us;
  for (int round = 0; round < 41; ++round) {
    reduce_us.push_back(once_us(r, [&] { r.comm->all_reduce(data, count, {ElementType::kFloat32}, {}); }));
    sweep_us.push_back(once_us(r, [&] {
      std::memcpy(bytes, bytes + half, half);
      std::memcpy(bytes + half, bytes, half);
    }));
  }
  if (r.rank != 0) return;
  const Times reduce = times_of(reduce_us), sweep = times_of(sweep_us);
  std::printf(
      "all_reduce 16 MiB %-8s least %6.0f median %6.0f us, sweep least %6.0f median %6.0f us, "
      "ratio of least %.2f of medians %.2f\n",
      path, reduce.least, reduce.median, sweep.least, sweep.median, reduce.least / sweep.least,
      reduce.median / sweep.median);
}

void small(Rank& r, const char* path) {
  std::vector<float> data(64, 0.0F);
  const int batch = 200;
  std::vector<double> barrier_us, reduce_us;
  for (int round = 0; round < 41; ++round) {
    barrier_us.push_back(once_us(r,
                                 [&] {
                                   for (int i = 0; i < batch; ++i) r.comm->barrier({});
                                 }) /
                         batch);
    reduce_us.push_back(once_us(r,
                                [&] {
                                  for (int i = 0; i < batch; ++i)
                                    r.comm->all_reduce(data.data(), 64, {ElementType::kFloat32}, {});
                                }) /
                        batch);
  }
  if (r.rank != 0) return;
  const Times barrier = times_of(barrier_us), reduce = times_of(reduce_us);
  std::printf("%-8s barrier least %.2f median %.2f us, all_reduce of 256 bytes least %.2f median %.2f us\n",
              path, barrier.least, barrier.median, reduce.least, reduce.median);
}

}  // namespace

int main() {
  ranks::run({.size = 2}, [](Rank& r) {
    large(r, "arena", true);
    large(r, "private", false);
    small(r, "shm");
  });
  ranks::run({.size = 2, .locality = {0, 1}}, [](Rank& r) {
    large(r, "tcp", false);
    small(r, "tcp");
  });
}
