// Instantiates Lion for the CPU.
#include "optim/rules/lion.h"

#include "optim/launch.h"
#include "optim/step.h"
#include "optim/tile_step.h"

namespace mlsys {

void lion_step(const StepArguments& args) { step_segments<Lion>(args); }

std::unique_ptr<TileStep> lion_tile_step(const StepArguments& args) {
  return std::make_unique<TableTileStep<Lion>>(args);
}

}  // namespace mlsys
