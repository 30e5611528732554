// Counts the connections that were turned away, and says so once in a while: never once for each, since
// whoever knocks ten thousand times would otherwise fill the log.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

namespace mlsys::comm {

// For any thread.
class Strangers {
 public:
  using Report = std::function<void(const std::string&)>;
  static constexpr std::chrono::seconds kQuiet{10};

  // `report` may be null.
  explicit Strangers(Report report) : report_(std::move(report)) {}

  // The first one is reported at once, then at most one line in kQuiet.
  void turn_away(const std::string& why);
  uint64_t count() const;

 private:
  const Report report_;
  mutable std::mutex mutex_;
  uint64_t count_ = 0;
  uint64_t reported_ = 0;
  std::chrono::steady_clock::time_point last_report_{};
};

}  // namespace mlsys::comm
