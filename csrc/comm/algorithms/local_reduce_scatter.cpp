// Reduce-scatter inside a host: rank r reads its part of every rank's input and writes its own output.
//
// direct  (all inputs in the shared arena, each contiguous): read in place; a barrier at the end, because
//         nobody may change its input while others read it.
// staged  tiles of every part go through the ranks' rings.
#include <array>
#include <vector>

#include "comm/algorithms/local.h"
#include "comm/local/staging.h"

namespace mlsys::comm {
namespace {

void scatter_direct(Context& context, const Reducer& reducer, std::span<const void* const> sources,
                    void* output, size_t count) {
  reducer.reduce(sources, std::array{output}, count);
  context.team.barrier();
  context.counters.add_zero_copy();
}

void scatter_staged(LocalTeam& team, const Reducer& reducer, std::span<const void* const> inputs,
                    void* output, size_t count) {
  const auto size = static_cast<size_t>(team.size());
  const auto me = static_cast<size_t>(team.index());
  const size_t element = reducer.element_bytes();
  const size_t lane = Ring::kSlotBytes / (size - 1) / 64 * 64;  // bytes of each other rank's part
  const size_t tile = lane / element;
  const auto elements = [&](size_t k) { return std::min(tile, count - k * tile); };
  // The lanes of a rank's slot are for the other ranks in order.
  const auto lane_of = [&](size_t from, size_t to) { return lane * (to < from ? to : to - 1); };
  std::vector<const void*> sources(size);
  Ring::run(
      team, (count + tile - 1) / tile,
      [&](size_t k, std::byte* slot) {
        for (size_t to = 0; to < size; ++to) {
          if (to == me) continue;
          team.copy_out(slot + lane_of(me, to), at(inputs[to], k * tile * element), elements(k) * element);
        }
      },
      [&](size_t k) {
        for (size_t from = 0; from < size; ++from) {
          sources[from] = from == me ? at(inputs[me], k * tile * element)
                                     : Ring::slot(team, static_cast<int>(from), k) + lane_of(from, me);
        }
        reducer.reduce(sources, std::array<void*, 1>{at(output, k * tile * element)}, elements(k));
      });
}

}  // namespace

void local_reduce_scatter(Context& context, const Reducer& reducer, std::span<const void* const> inputs,
                          void* output, size_t count) {
  LocalTeam& team = context.team;
  const auto size = static_cast<size_t>(team.size());
  const size_t bytes = count * reducer.element_bytes();
  context.counters.add_shm(bytes * (size - 1));
  std::vector<const void*> sources;
  bool direct = true;
  for (int local = 0; local < team.size(); ++local) {
    const std::byte* input = team.published(local, team.descriptor(local).arena_offset, bytes * size);
    direct &= input != nullptr;
    sources.push_back(input == nullptr ? nullptr : input + static_cast<size_t>(team.index()) * bytes);
  }
  if (direct) return scatter_direct(context, reducer, sources, output, count);
  scatter_staged(team, reducer, inputs, output, count);
}

}  // namespace mlsys::comm
