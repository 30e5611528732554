// Instantiates AdamW for the CPU: one file a rule, so that builds stay parallel.
#include "optim/rules/adamw.h"

#include "optim/fused_forms.h"
#include "optim/launch.h"
#include "optim/step.h"
#include "optim/tile_step.h"

namespace mlsys {

template <>
struct FusedForms<AdamW> : CommonForms<AdamW> {};

void adamw_step(const StepArguments& args) { step_segments<AdamW, AmsgradAdamW>(args); }

std::unique_ptr<TileStep> adamw_tile_step(const StepArguments& args) {
  return std::make_unique<TableTileStep<AdamW, AmsgradAdamW>>(args);
}

}  // namespace mlsys
