#include "bindings/comm/membership.h"

#include <stdexcept>
#include <utility>

#include "bindings/comm/interruptible_store.h"

namespace mlsys::binding {

Membership::Membership(std::shared_ptr<InterruptibleStore> store, comm::Options options,
                       c10::DeviceType accelerator_type, Accelerator::Maker make_accelerator,
                       Accelerator::SmallMaker make_small)
    : options_(std::move(options)),
      store_(std::move(store)),
      communicator_(comm::Communicator::create(store_, options_)),
      accelerator_(accelerator_type, std::move(make_accelerator), std::move(make_small)) {}

Membership::~Membership() { leave(std::chrono::milliseconds(0)); }

int Membership::global_rank_of(int group_rank) const {
  const auto& ranks = options_.global_ranks;
  const auto index = static_cast<size_t>(group_rank);
  return group_rank >= 0 && index < ranks.size() ? ranks[index] : group_rank;
}

void Membership::leave(std::chrono::milliseconds grace) {
  std::unique_lock lock(leaving_);
  if (left_) return;
  left_ = true;
  const bool finished = executor_.close(grace);
  if (!finished) {
    store_->interrupt();
    try {
      communicator_->poison("left the group with collectives under way");
    } catch (const std::exception&) {
      // Nobody can be told, because the store or the peers are gone already; leaving must go on.
    }
  }
  communicator_->shutdown();  // before the executor: what blocks its thread fails now
  executor_.stop(std::make_exception_ptr(std::runtime_error("the process group was shut down")));
  accelerator_.close(finished && grace.count() > 0);  // after the watch thread, which may abort it
}

}  // namespace mlsys::binding
