// Instantiates schedule-free AdamW for the CPU.
#include "optim/rules/schedule_free_adamw.h"

#include "optim/launch.h"
#include "optim/step.h"
#include "optim/tile_step.h"

namespace mlsys {

void schedule_free_adamw_step(const StepArguments& args) { step_segments<ScheduleFreeAdamW>(args); }

std::unique_ptr<TileStep> schedule_free_adamw_tile_step(const StepArguments& args) {
  return std::make_unique<TableTileStep<ScheduleFreeAdamW>>(args);
}

}  // namespace mlsys
