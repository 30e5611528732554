// Instantiates Adam for the CPU.
#include "optim/rules/adam.h"

#include "optim/launch.h"
#include "optim/step.h"
#include "optim/tile_step.h"

namespace mlsys {

void adam_step(const StepArguments& args) { step_segments<Adam, AmsgradAdam>(args); }

std::unique_ptr<TileStep> adam_tile_step(const StepArguments& args) {
  return std::make_unique<TableTileStep<Adam, AmsgradAdam>>(args);
}

}  // namespace mlsys
