// Scatter and all-to-all inside a host: a different piece for every pair, of any size.
//
// Each rank's staging area is cut into one lane for every destination. Round k moves bytes [k*lane,
// (k+1)*lane) of every piece; pieces that are shorter have nothing left to do but signal. The number of
// rounds follows from the largest piece of all, which everyone reads from the published sizes.
// Double-buffered by parity.
#include <cstring>
#include <vector>

#include "comm/algorithms/local.h"

namespace mlsys::comm {
namespace {

size_t published_size(const LocalTeam& team, int source, int destination) {
  uint64_t bytes = 0;
  std::memcpy(&bytes, team.inline_payload(source) + static_cast<size_t>(destination) * sizeof(bytes),
              sizeof(bytes));
  return bytes;
}

}  // namespace

void local_exchange(Context& context, std::span<const void* const> inputs, std::span<const size_t> send_bytes,
                    std::span<void* const> outputs, std::span<const size_t> receive_bytes) {
  LocalTeam& team = context.team;
  const int me = team.index();
  const auto size = static_cast<size_t>(team.size());
  size_t largest = 0;
  for (int from = 0; from < team.size(); ++from) {
    for (int to = 0; to < team.size(); ++to) {
      if (from != to) largest = std::max(largest, published_size(team, from, to));
    }
    const size_t expected = receive_bytes[static_cast<size_t>(from)];
    if (published_size(team, from, me) != expected) {
      context.faults.fail_mismatch(
          describe_size_mismatch(team.descriptor(from).rank, published_size(team, from, me), team.mine().rank,
                                 expected),
          team.mine());
    }
    if (from != me) context.counters.add_shm(expected);
  }
  copy_bytes(outputs[static_cast<size_t>(me)], inputs[static_cast<size_t>(me)],
             send_bytes[static_cast<size_t>(me)]);
  const size_t half = ControlBlock::kStageBytes / 2;
  const size_t lane = half / size / 64 * 64;
  const auto piece = [&](size_t bytes, size_t k) {
    return std::min(lane, bytes - std::min(bytes, k * lane));
  };
  for (size_t k = 0; k * lane < largest; ++k) {
    if (k >= 2) team.await_all(LocalTeam::kSecond, static_cast<uint32_t>(k - 1));
    for (size_t to = 0; to < size; ++to) {
      if (static_cast<int>(to) == me) continue;
      copy_bytes(team.stage(me) + (k & 1) * half + to * lane, at(inputs[to], k * lane),
                 piece(send_bytes[to], k));
    }
    team.signal(LocalTeam::kFirst);
    for (size_t from = 0; from < size; ++from) {
      const size_t n = piece(receive_bytes[from], k);
      if (static_cast<int>(from) == me || n == 0) continue;
      team.await(LocalTeam::kFirst, static_cast<int>(from), static_cast<uint32_t>(k + 1));
      copy_bytes(at(outputs[from], k * lane),
                 team.stage(static_cast<int>(from)) + (k & 1) * half + static_cast<size_t>(me) * lane, n);
    }
    team.signal(LocalTeam::kSecond);
  }
}

}  // namespace mlsys::comm
