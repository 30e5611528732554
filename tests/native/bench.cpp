// Timings of the core alone: all-reduce of 16 MiB over each path against a ceiling, and latencies. Prints
// medians. The ceiling is every rank sweeping (reading and writing) its own buffer at once with memcpy into
// itself: copying half of the buffer onto the other half twice reads and writes as many bytes as the least
// that an all-reduce must move.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "check.h"
#include "ranks.h"

namespace {

using Clock = std::chrono::steady_clock;
using mlsys::comm::ElementType;
using ranks::Rank;

template <class Body>
double median_us(Rank& r, int rounds, Body body) {
  std::vector<double> times;
  for (int round = 0; round < rounds; ++round) {
    r.comm->barrier({});
    const auto start = Clock::now();
    body();
    times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void large(Rank& r, const char* path, bool arena) {
  const size_t count = size_t{4} << 20;
  std::vector<float> own(arena ? 0 : count);
  const auto block = arena ? r.comm->allocate(count * sizeof(float)) : std::shared_ptr<void>();
  float* data = arena ? static_cast<float*>(block.get()) : own.data();
  std::fill(data, data + count, 0.0F);
  auto* bytes = reinterpret_cast<char*>(data);
  const size_t half = count * sizeof(float) / 2;
  const double us = median_us(r, 21, [&] { r.comm->all_reduce(data, count, {ElementType::kFloat32}, {}); });
  const double ceiling = median_us(r, 21, [&] {
    std::memcpy(bytes, bytes + half, half);
    std::memcpy(bytes + half, bytes, half);
  });
  if (r.rank == 0) {
    std::printf("all_reduce 16 MiB %-8s %8.0f us  sweep of the buffer %6.0f us  ratio %.2f\n", path, us,
                ceiling, us / ceiling);
  }
}

void small(Rank& r, const char* path) {
  std::vector<float> data(64, 0.0F);
  const int batch = 200;
  const double barrier = median_us(r, 21,
                                   [&] {
                                     for (int i = 0; i < batch; ++i) r.comm->barrier({});
                                   }) /
                         batch;
  const double reduce = median_us(r, 21,
                                  [&] {
                                    for (int i = 0; i < batch; ++i)
                                      r.comm->all_reduce(data.data(), 64, {ElementType::kFloat32}, {});
                                  }) /
                        batch;
  if (r.rank == 0)
    std::printf("%-8s barrier %.2f us, all_reduce of 256 bytes %.2f us\n", path, barrier, reduce);
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
