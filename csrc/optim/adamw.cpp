// Instantiates AdamW for the CPU: one file a rule, so that builds stay parallel.
#include "optim/rules/adamw.h"

#include "optim/launch.h"
#include "optim/step.h"

namespace mlsys {

void adamw_step(const StepArguments& args) { step_segments<AdamW>(args); }

}  // namespace mlsys
