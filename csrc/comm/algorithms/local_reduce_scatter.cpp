// Reduce-scatter inside a host: rank r reads its part of every rank's input and writes its own output.
//
// direct  (all inputs in the shared arena, each contiguous): read in place; a barrier at the end, because
// nobody may
//         change its input while others read it.
// staged  tiles of every part go through shared memory, double-buffered: before tile k+2 overwrites tile k,
// all
//         have signalled that they reduced tile k.
#include <array>
#include <vector>

#include "comm/algorithms/local.h"

namespace mlsys::comm {
namespace {

void scatter_direct(Context& context, const Reducer& reducer, std::span<std::byte* const> buffers,
                    void* output, size_t count) {
  const size_t part_bytes = count * reducer.element_bytes();
  std::vector<const void*> sources;
  for (const std::byte* buffer : buffers) {
    sources.push_back(buffer + static_cast<size_t>(context.team.index()) * part_bytes);
  }
  reducer.reduce(sources, std::array{output}, count);
  context.team.barrier();
  context.counters.add_shm(part_bytes * (buffers.size() - 1));
  context.counters.add_zero_copy();
}

}  // namespace

void local_reduce_scatter(Context& context, const Reducer& reducer, std::span<const void* const> inputs,
                          void* output, size_t count) {
  LocalTeam& team = context.team;
  const auto size = static_cast<size_t>(team.size());
  const size_t element = reducer.element_bytes();
  std::vector<std::byte*> buffers;
  bool direct = true;
  for (int local = 0; local < team.size(); ++local) {
    buffers.push_back(team.published(local, team.descriptor(local).arena_offset, count * element * size));
    direct &= buffers.back() != nullptr;
  }
  if (direct) return scatter_direct(context, reducer, buffers, output, count);

  const size_t half = ControlBlock::kStageBytes / 2;
  const size_t tile = half / size / 64 * 64 / element;  // elements of each part
  const size_t num_tiles = (count + tile - 1) / tile;
  for (size_t k = 0; k < num_tiles; ++k) {
    const size_t n = std::min(tile, count - k * tile);
    if (k >= 2) team.await_all(LocalTeam::kSecond, static_cast<uint32_t>(k - 1));
    const auto staged = [&](int local, size_t part) {
      return team.stage(local) + (k & 1) * half + part * tile * element;
    };
    for (size_t part = 0; part < size; ++part) {
      copy_bytes(staged(team.index(), part), at(inputs[part], k * tile * element), n * element);
    }
    team.signal(LocalTeam::kFirst);
    team.await_all(LocalTeam::kFirst, static_cast<uint32_t>(k + 1));
    std::vector<const void*> sources;
    for (int local = 0; local < team.size(); ++local) {
      sources.push_back(staged(local, static_cast<size_t>(team.index())));
    }
    void* target = at(output, k * tile * element);
    reducer.reduce(sources, std::array{target}, n);
    team.signal(LocalTeam::kSecond);
  }
  context.counters.add_shm(count * element * (size - 1));
}

}  // namespace mlsys::comm
