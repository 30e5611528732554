// The fused step piece by piece: for a collective that hands out the reduced gradient tile by tile.
//
// Same table, same formula and same bits as step.h, on float32 arrays alone; the table's gradient column is
// not read, since a tile's gradient is wherever the caller has it. Rows are sorted by the address of their
// parameters, and tiles come in ascending order of it.
#pragma once

#include <algorithm>
#include <memory>
#include <string_view>

#include "optim/launch.h"
#include "optim/step.h"

namespace mlsys {

class TileStep {
 public:
  virtual ~TileStep() = default;
  // Steps those of param[0, count) that the table names; the gradient of param[i] is gradient[i].
  virtual void step(const float* gradient, float* param, int64_t count) = 0;
};

// The tile step of a rule by its name in mlsys_engine/optim/registry.py; null for a name that is none, or
// that of a rule which needs whole tensors. What `args` points at must outlive it; its pool is not used, the
// caller's thread is.
std::unique_ptr<TileStep> make_tile_step(std::string_view rule, const StepArguments& args);

#define MLSYS_DECLARE(rule) std::unique_ptr<TileStep> rule##_tile_step(const StepArguments& args);
MLSYS_ELEMENT_RULES(MLSYS_DECLARE)
#undef MLSYS_DECLARE

template <class First, class... Others>
class TableTileStep final : public TileStep {
 public:
  explicit TableTileStep(const StepArguments& args) : args_(args) { check_states<First, Others...>(args); }

  void step(const float* gradient, float* param, int64_t count) override {
    const int64_t begin = address(param);
    const int64_t end = begin + count * kBytes;
    while (next_ < args_.num_segments && end_of(args_.segments[next_]) <= begin) ++next_;
    for (int64_t i = next_; i < args_.num_segments && args_.segments[i].param < end; ++i) {
      const Segment& whole = args_.segments[i];
      const int64_t low = std::max(whole.param, begin);
      Segment piece = whole;
      piece.param = low;
      piece.grad = address(gradient) + (low - begin);
      for (int64_t& state : piece.state) state += state == 0 ? 0 : low - whole.param;
      piece.numel = (std::min(end_of(whole), end) - low) / kBytes;
      prepared_.prepare(args_, whole);
      with_rule<First, Others...>(piece.num_states(), [&]<class Rule>() {
        step_plain<Rule>(prepared_.scalars, piece, 0, piece.numel);
      });
    }
  }

 private:
  static constexpr int64_t kBytes = sizeof(float);  // of a parameter, a gradient and a moment alike

  static int64_t address(const void* pointer) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer));
  }
  static int64_t end_of(const Segment& segment) { return segment.param + segment.numel * kBytes; }

  const StepArguments args_;
  int64_t next_ = 0;  // all rows before it end before the present tile
  Prepared<First> prepared_;
};

}  // namespace mlsys
