// The fused step piece by piece: for a collective that hands out the reduced gradient tile by tile.
//
// Same table, same formula and same bits as step.h; the table's gradient column is not read, since a tile's
// gradient is wherever the caller has it. Rows are sorted by the address of their parameters, and tiles come
// in ascending order of it.
#pragma once

#include <algorithm>
#include <memory>
#include <string_view>

#include "optim/step.h"

namespace mlsys {

class TileStep {
 public:
  virtual ~TileStep() = default;
  // Steps those of param[0, count) that the table names; the gradient of param[i] is gradient[i].
  virtual void step(const float* gradient, float* param, int64_t count) = 0;
};

// The tile step of a rule by its name in mlsys_engine/optim/registry.py; null for a name that is none. What
// `args` points at must outlive it; its pool is not used, the caller's thread is.
std::unique_ptr<TileStep> make_tile_step(std::string_view rule, const StepArguments& args);

std::unique_ptr<TileStep> adamw_tile_step(const StepArguments& args);
std::unique_ptr<TileStep> sgd_tile_step(const StepArguments& args);

template <class Rule, class StatelessRule = Rule>
class TableTileStep final : public TileStep {
 public:
  explicit TableTileStep(const StepArguments& args) : args_(args) {}

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
      prepare(whole);
      piece.state[0] == 0 ? step_stretch<StatelessRule, float, float, float>(scalars_, piece, 0, piece.numel)
                          : step_stretch<Rule, float, float, float>(scalars_, piece, 0, piece.numel);
    }
  }

 private:
  static constexpr int64_t kBytes = sizeof(float);  // of a parameter, a gradient and a moment alike

  static int64_t address(const void* pointer) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer));
  }
  static int64_t end_of(const Segment& segment) { return segment.param + segment.numel * kBytes; }

  // Powers are computed once for neighbours that agree, as step.h does.
  void prepare(const Segment& segment) {
    const float step = args_.steps[segment.step_index];
    if (segment.hyper_row == row_ && step == step_) return;
    row_ = segment.hyper_row;
    step_ = step;
    scalars_ = Rule::prepare(args_.hyper + row_ * kHyperColumns, step, args_.grad_scale);
  }

  const StepArguments args_;
  int64_t next_ = 0;  // all rows before it end before the present tile
  int64_t row_ = -1;
  float step_ = -1.0f;
  typename Rule::Scalars scalars_{};
};

}  // namespace mlsys
