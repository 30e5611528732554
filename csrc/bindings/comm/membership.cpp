#include "bindings/comm/membership.h"

#include <algorithm>
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

std::exception_ptr Membership::told(std::exception_ptr failure, const Place& place, const Record& record) {
  if (!failure) {
    record.completed();
    return nullptr;
  }
  failure = with_call_sites(failure, place.sequence, record.call_site());
  record.failed(failure);
  return for_python(failure, place);
}

std::exception_ptr Membership::with_call_sites(std::exception_ptr failure, uint64_t sequence,
                                               const std::string& own_site) {
  using std::chrono::milliseconds, std::chrono::steady_clock;
  if (own_site.empty()) return failure;
  try {
    std::rethrow_exception(failure);
  } catch (const comm::Mismatch& mismatch) {
    const auto key = [&](int rank) {
      return "mlsys/" + options_.group_name + "/call_site/" + std::to_string(sequence) + "/" +
             std::to_string(rank);
    };
    const auto deadline = steady_clock::now() + milliseconds(1000);
    const auto get = [&](const std::string& name) {
      const auto left = std::chrono::duration_cast<milliseconds>(deadline - steady_clock::now());
      return store_->get(name, std::max(left, milliseconds(0)));
    };
    std::string text = std::string(mismatch.what()) + " Called at:";
    try {
      store_->separate(milliseconds(1000));
      store_->set(key(options_.rank), std::vector<uint8_t>(own_site.begin(), own_site.end()));
      for (int rank = 0; rank < options_.size; ++rank) {
        const auto site = get(key(rank));
        text += " rank " + std::to_string(global_rank_of(rank)) + ", " +
                std::string(site.begin(), site.end()) + ";";
      }
      // Rank 0 may host the store: it stays until the others have read.
      store_->set(key(options_.rank) + "/read", {});
      for (int rank = 1; options_.rank == 0 && rank < options_.size; ++rank) get(key(rank) + "/read");
    } catch (const std::exception&) {
      text += " others did not tell;";  // one that met the mismatch elsewhere, or whose store is gone
    }
    text.back() = '.';
    return std::make_exception_ptr(comm::Mismatch(text));
  } catch (...) {
    return failure;
  }
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
