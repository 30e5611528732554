// What a block's run depends on besides its arguments: the random states of its devices and autocast.
//
// A run is captured before it starts. Random states are kept only where the run was seen to draw from them:
// on the CPU 2.5 kB, compared afterwards; on other devices seed and offset (Philox counters).
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>

#include <memory>
#include <vector>

namespace mlsys::activation {

struct CpuRandomState {
  at::mt19937 engine;
  std::optional<float> next_float;
  std::optional<double> next_double;

  static CpuRandomState now();
  void restore() const;
  bool equals(const CpuRandomState& other) const;
};

struct DeviceRandomState {
  at::Generator generator;
  uint64_t seed, offset;

  static DeviceRandomState now(at::Generator generator);
  void restore();
};

struct AutocastState {
  at::DeviceType device;
  bool enabled;
  at::ScalarType dtype;
  bool cached;

  static AutocastState now(at::DeviceType device);
  bool operator==(const AutocastState&) const = default;
};

class RunContext {
 public:
  // As it is now, for a run whose arguments lie on these devices.
  explicit RunContext(const std::vector<at::Tensor>& arguments);

  // Called after the first run: forgets the random states that it did not change.
  void forget_unused();

  // While it lives, random states and autocast are those that were captured; then the present ones again.
  class Restored {
   public:
    explicit Restored(const RunContext& context);
    ~Restored();
    Restored(const Restored&) = delete;
    Restored& operator=(const Restored&) = delete;

   private:
    std::unique_ptr<CpuRandomState> cpu_;
    std::vector<DeviceRandomState> devices_;
    std::vector<AutocastState> autocast_;
  };

 private:
  std::unique_ptr<CpuRandomState> cpu_;
  std::vector<DeviceRandomState> devices_;
  std::vector<AutocastState> autocast_;
};

}  // namespace mlsys::activation
