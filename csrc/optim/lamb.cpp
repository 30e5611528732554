// Instantiates LAMB for the CPU.
#include "optim/rules/lamb.h"

#include "optim/launch.h"
#include "optim/tensor_step.h"

namespace mlsys {

void lamb_step(const StepArguments& args) { step_tensors<LambMeasure, LambApply>(args); }

}  // namespace mlsys
