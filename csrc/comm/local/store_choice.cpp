#include "comm/local/store_choice.h"

#include <algorithm>
#include <utility>

namespace mlsys::comm {

void StoreChoice::record(size_t num_tiles, std::chrono::nanoseconds spent) {
  if (!std::exchange(warm_, true)) return;
  double& known = ns_per_tile_[streaming()];
  const double now = static_cast<double>(spent.count()) / static_cast<double>(std::max<size_t>(1, num_tiles));
  // A single slow operation (a rank that came late, a descheduled one) must not decide.
  known = known == 0 ? now : std::min(now, known + (now - known) / 4);
  num_since_trial_ = trying_ ? 0 : num_since_trial_ + 1;
  best_ = ns_per_tile_[1] != 0 && ns_per_tile_[1] < ns_per_tile_[0];
  trying_ = ns_per_tile_[!best_] == 0 || num_since_trial_ >= kTrialEvery;
}

}  // namespace mlsys::comm
