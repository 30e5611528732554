// Instantiates SGD for the CPU. Groups with and without momentum may share one table.
#include "optim/rules/sgd.h"

#include "optim/launch.h"
#include "optim/step.h"
#include "optim/tile_step.h"

namespace mlsys {

void sgd_step(const StepArguments& args) { step_segments<PlainSgd, MomentumSgd>(args); }

std::unique_ptr<TileStep> sgd_tile_step(const StepArguments& args) {
  return std::make_unique<TableTileStep<PlainSgd, MomentumSgd>>(args);
}

}  // namespace mlsys
