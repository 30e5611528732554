#include "comm/local/control_block.h"

#include <stdexcept>
#include <string>

namespace mlsys::comm {
namespace {

constexpr size_t kPage = 4096;

size_t page_up(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

struct Layout {
  size_t presence, notices, slots, claims, tuning, eager, stages, scratch, total;
};

Layout layout(int local_size, int world_size) {
  Layout l{};
  l.presence = page_up(sizeof(PoisonRecord));
  l.notices = l.presence + page_up(sizeof(uint32_t) * world_size);
  l.slots = l.notices + page_up(sizeof(Notice) * world_size);
  l.claims = l.slots + page_up(sizeof(RankSlot) * local_size);
  l.tuning = l.claims + page_up(sizeof(ClaimSet) * 2 * ControlBlock::kClaimPhases);
  l.eager = l.tuning + page_up(sizeof(Tuning));
  l.stages = l.eager + ControlBlock::kEagerBytes * 2 * local_size;
  l.scratch = l.stages + ControlBlock::kStageBytes * local_size;
  l.total = l.scratch + ControlBlock::kScratchBytes;
  return l;
}

}  // namespace

size_t ControlBlock::bytes_for(int local_size, int world_size) {
  return layout(local_size, world_size).total;
}

UniqueFd ControlBlock::make(int local_size, int world_size) {
  return make_memfd("mlsys-control", bytes_for(local_size, world_size));
}

ControlBlock::ControlBlock(const UniqueFd& fd, int local_size, int world_size)
    : local_size_(local_size), world_size_(world_size) {
  const Layout l = layout(local_size, world_size);
  if (file_bytes(fd.get()) < l.total) {
    throw std::runtime_error("the host's control block has " + std::to_string(file_bytes(fd.get())) +
                             " bytes but " + std::to_string(l.total) + " are needed for " +
                             std::to_string(local_size) + " local ranks of " + std::to_string(world_size) +
                             ". All ranks must run the same build.");
  }
  presence_offset_ = l.presence;
  notices_offset_ = l.notices;
  slots_offset_ = l.slots;
  claims_offset_ = l.claims;
  tuning_offset_ = l.tuning;
  eager_offset_ = l.eager;
  stages_offset_ = l.stages;
  scratch_offset_ = l.scratch;
  mapping_ = Mapping(fd.get(), l.total);
}

}  // namespace mlsys::comm
