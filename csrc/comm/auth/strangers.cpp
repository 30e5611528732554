#include "comm/auth/strangers.h"

namespace mlsys::comm {

void Strangers::turn_away(const std::string& why) {
  std::string line;
  {
    const std::lock_guard lock(mutex_);
    ++count_;
    const auto now = std::chrono::steady_clock::now();
    if (!report_ || (reported_ != 0 && now - last_report_ < kQuiet)) return;
    line = "turned away " + std::to_string(count_ - reported_) +
           " connection(s) from outside the job; the last: " + why + ".";
    reported_ = count_;
    last_report_ = now;
  }
  report_(line);
}

uint64_t Strangers::count() const {
  const std::lock_guard lock(mutex_);
  return count_;
}

}  // namespace mlsys::comm
