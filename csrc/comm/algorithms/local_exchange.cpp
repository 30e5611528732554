// Scatter and all-to-all inside a host: a different piece for every pair, of any size.
//
// A piece that lies in its sender's arena is copied by the receiver from where it is; a barrier at the end,
// because the sender must not change it before. The other pieces go through the senders' rings, a slot of
// which is cut into one lane for every other rank: tile k moves bytes [k*lane, (k+1)*lane) of each. The
// number of tiles follows from the largest such piece of all, which everyone reads from the published
// entries.
#include <cstring>
#include <numeric>
#include <vector>

#include "comm/algorithms/local.h"
#include "comm/local/staging.h"
#include "core/streaming.h"

namespace mlsys::comm {
namespace {

ExchangeEntry entry_of(const LocalTeam& team, int source, int destination) {
  ExchangeEntry entry;
  std::memcpy(&entry, team.inline_payload(source) + static_cast<size_t>(destination) * sizeof(entry),
              sizeof(entry));
  return entry;
}

bool is_direct(const ExchangeEntry& entry) { return entry.arena_offset != Descriptor::kNoOffset; }

void check_sizes(Context& context, std::span<const size_t> receive_bytes) {
  LocalTeam& team = context.team;
  for (int from = 0; from < team.size(); ++from) {
    const size_t sent = entry_of(team, from, team.index()).bytes;
    const size_t expected = receive_bytes[static_cast<size_t>(from)];
    if (sent != expected) {
      context.faults.fail_mismatch(
          describe_size_mismatch(team.descriptor(from).rank, sent, team.mine().rank, expected), team.mine());
    }
    if (from != team.index()) context.counters.add_shm(expected);
  }
}

template <class Slots>
void exchange_staged(LocalTeam& team, std::span<const void* const> inputs, std::span<void* const> outputs,
                     size_t largest, Copy copy) {
  const auto size = static_cast<size_t>(team.size());
  const auto me = static_cast<size_t>(team.index());
  const size_t lane = Slots::kSlotBytes / (size - 1) / 64 * 64;
  const auto lane_of = [&](size_t from, size_t to) { return lane * (to < from ? to : to - 1); };
  const auto length = [&](size_t from, size_t to, size_t k) {
    const ExchangeEntry entry = entry_of(team, static_cast<int>(from), static_cast<int>(to));
    const size_t bytes = from == to || is_direct(entry) ? 0 : entry.bytes;
    return std::min(lane, bytes - std::min(bytes, k * lane));
  };
  Slots::run(
      team, (largest + lane - 1) / lane,
      [&](size_t k, std::byte* slot) {
        for (size_t to = 0; to < size; ++to) {
          const size_t n = length(me, to, k);
          if (n != 0) team.copy_out(slot + lane_of(me, to), at(inputs[to], k * lane), n);
        }
      },
      [&](size_t k) {
        for (size_t from = 0; from < size; ++from) {
          const size_t n = length(from, me, k);
          if (n == 0) continue;
          const std::byte* slot = Slots::slot(team, static_cast<int>(from), k);
          copy(at(outputs[from], k * lane), slot + lane_of(from, me), n);
        }
      });
}

}  // namespace

void local_exchange(Context& context, std::span<const void* const> inputs, std::span<const size_t> send_bytes,
                    std::span<void* const> outputs, std::span<const size_t> receive_bytes) {
  LocalTeam& team = context.team;
  const int me = team.index();
  check_sizes(context, receive_bytes);
  const Copy copy = copy_for_result(std::accumulate(receive_bytes.begin(), receive_bytes.end(), size_t{0}));
  size_t largest = 0;
  bool any_direct = false;
  for (int from = 0; from < team.size(); ++from) {
    for (int to = 0; to < team.size(); ++to) {
      const ExchangeEntry entry = entry_of(team, from, to);
      if (from == to || entry.bytes == 0) continue;
      any_direct |= is_direct(entry);
      if (!is_direct(entry)) largest = std::max<size_t>(largest, entry.bytes);
    }
  }
  const auto own = static_cast<size_t>(me);
  copy(outputs[own], inputs[own], send_bytes[own]);
  for (int from = 0; from < team.size(); ++from) {
    const ExchangeEntry entry = entry_of(team, from, me);
    if (from == me || entry.bytes == 0 || !is_direct(entry)) continue;
    copy(outputs[static_cast<size_t>(from)], team.published(from, entry.arena_offset, entry.bytes),
         entry.bytes);
  }
  if (largest != 0) {
    team.size() > 2 ? exchange_staged<WideRing>(team, inputs, outputs, largest, copy)
                    : exchange_staged<Ring>(team, inputs, outputs, largest, copy);
  }
  if (!any_direct) return;
  team.barrier();
  context.counters.add_zero_copy();
}

}  // namespace mlsys::comm
