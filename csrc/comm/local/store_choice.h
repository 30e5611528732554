// Which stores should write what other ranks read, ordinary or streaming: learned from the operations
// themselves.
//
// It depends on things that change while a job runs. Where the cores of two ranks share a cache, ordinary
// stores leave the data there, and streaming ones send it to memory and back, up to twice as slow. Where they
// do not (and a virtual machine's cores are moved now and then), every ordinary store waits until the other
// core has given up the line, and streaming is twice as fast. So now and then an operation tries the other
// kind. Each rank chooses for itself: results are the same either way.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>

namespace mlsys::comm {

class StoreChoice {
 public:
  // For the operation that begins now.
  bool streaming() const { return best_ != trying_; }
  // It moved `num_tiles` in `spent`. The first one of all is not counted: it touches new memory.
  void record(size_t num_tiles, std::chrono::nanoseconds spent);

 private:
  static constexpr int kTrialEvery = 16;

  std::array<double, 2> ns_per_tile_{};  // of ordinary and of streaming stores, lately; 0 is unknown
  bool best_ = false;
  bool trying_ = false;  // the other kind than the best
  int num_since_trial_ = 0;
  bool warm_ = false;
};

}  // namespace mlsys::comm
