// Instantiates Adagrad for the CPU.
#include "optim/rules/adagrad.h"

#include "optim/launch.h"
#include "optim/step.h"
#include "optim/tile_step.h"

namespace mlsys {

void adagrad_step(const StepArguments& args) { step_segments<Adagrad>(args); }

std::unique_ptr<TileStep> adagrad_tile_step(const StepArguments& args) {
  return std::make_unique<TableTileStep<Adagrad>>(args);
}

}  // namespace mlsys
