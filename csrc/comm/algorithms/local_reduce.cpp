// All-reduce (and reduce to a root) inside a host. Three ways with the same bits:
//
// inline  (at most 4 KiB): every rank published its contribution beside its descriptor, so after the arrival
// each
//         rank reduces everything for itself: one barrier in all.
// direct  (all contributions in the shared arena): rank i owns slice i, reads it from all ranks and writes
// the
//         result into all ranks: every byte is read once and written once. The arrival says that inputs are
//         ready, a barrier at the end that results are complete.
// staged  (private memory): tiles go through two input and two output tiles of each rank. Tile k+1 is copied
// in
//         before tile k is reduced, so that slow ranks overlap with fast ones.
#include <vector>

#include "comm/algorithms/local.h"

namespace mlsys::comm {
namespace {

constexpr size_t kGrain = 64;         // elements: slice boundaries on cache lines for every type
constexpr size_t kSweep = 256 << 10;  // bytes: how much of a slice is swept at once

std::vector<const void*> sources_at(std::span<std::byte* const> bases, size_t offset) {
  std::vector<const void*> sources;
  for (const std::byte* base : bases) sources.push_back(base + offset);
  return sources;
}

void reduce_inline(Context& context, const Reducer& reducer, void* data, size_t count, int root) {
  if (root >= 0 && root != context.team.index()) return;
  std::vector<const void*> sources;
  for (int local = 0; local < context.team.size(); ++local)
    sources.push_back(context.team.inline_payload(local));
  reducer.reduce(sources, std::array{data}, count);
  context.counters.add_shm(count * reducer.element_bytes() * static_cast<size_t>(context.team.size() - 1));
}

void reduce_direct(Context& context, const Reducer& reducer, std::span<std::byte* const> buffers,
                   size_t count, int root) {
  LocalTeam& team = context.team;
  const auto size = static_cast<size_t>(team.size());
  const Range slice = part_of(count, static_cast<size_t>(team.index()), size, kGrain);
  const size_t step = kSweep / reducer.element_bytes();
  for (size_t done = 0; done < slice.count; done += step) {
    const size_t n = std::min(step, slice.count - done);
    const size_t offset = (slice.first + done) * reducer.element_bytes();
    std::vector<void*> targets;
    for (int local = 0; local < team.size(); ++local) {
      if (root < 0 || root == local) targets.push_back(buffers[static_cast<size_t>(local)] + offset);
    }
    reducer.reduce(sources_at(buffers, offset), targets, n);
  }
  team.barrier();
  const size_t written = root < 0 ? size - 1 : (root == team.index() ? 0 : 1);
  context.counters.add_shm(slice.count * reducer.element_bytes() * (size - 1 + written));
  context.counters.add_zero_copy();
}

void reduce_staged(Context& context, const Reducer& reducer, void* data, size_t count, int root) {
  LocalTeam& team = context.team;
  const auto size = static_cast<size_t>(team.size());
  const size_t element = reducer.element_bytes();
  const size_t tile = ControlBlock::kTileBytes / element;
  const size_t num_tiles = (count + tile - 1) / tile;
  const bool wants_result = root < 0 || root == team.index();
  const auto tile_count = [&](size_t k) { return std::min(tile, count - k * tile); };
  const auto in = [&](int local, size_t k) { return team.stage(local) + (k & 1) * ControlBlock::kTileBytes; };
  const auto out = [&](int local, size_t k) {
    return team.stage(local) + (2 + (k & 1)) * ControlBlock::kTileBytes;
  };
  const auto copy_in = [&](size_t k) {
    copy_bytes(in(team.index(), k), at(data, k * tile * element), tile_count(k) * element);
    team.signal(LocalTeam::kFirst);
  };
  if (num_tiles > 0) copy_in(0);
  for (size_t k = 0; k < num_tiles; ++k) {
    // Safe: tile k-1, which lay there, has been reduced by all (they signalled, and this rank waited, below).
    if (k + 1 < num_tiles) copy_in(k + 1);
    team.await_all(LocalTeam::kFirst, static_cast<uint32_t>(k + 1));
    const Range mine = part_of(tile_count(k), static_cast<size_t>(team.index()), size, kGrain);
    std::vector<const void*> sources;
    for (int local = 0; local < team.size(); ++local) sources.push_back(in(local, k) + mine.first * element);
    void* target = out(team.index(), k) + mine.first * element;
    reducer.reduce(sources, std::array{target}, mine.count);
    team.signal(LocalTeam::kSecond);
    team.await_all(LocalTeam::kSecond, static_cast<uint32_t>(k + 1));
    for (int local = 0; wants_result && local < team.size(); ++local) {
      const Range part = part_of(tile_count(k), static_cast<size_t>(local), size, kGrain);
      copy_bytes(at(data, (k * tile + part.first) * element), out(local, k) + part.first * element,
                 part.count * element);
    }
  }
  context.counters.add_shm(count * element * 2 * (size - 1) / size);
}

}  // namespace

void local_reduce(Context& context, const Reducer& reducer, void* data, size_t count, int root) {
  LocalTeam& team = context.team;
  const size_t bytes = count * reducer.element_bytes();
  if (fits_inline(bytes)) return reduce_inline(context, reducer, data, count, root);
  std::vector<std::byte*> buffers;
  bool direct = true;
  for (int local = 0; local < team.size(); ++local) {
    buffers.push_back(team.published(local, team.descriptor(local).arena_offset, bytes));
    direct &= buffers.back() != nullptr;
  }
  if (direct) return reduce_direct(context, reducer, buffers, count, root);
  reduce_staged(context, reducer, data, count, root);
}

}  // namespace mlsys::comm
