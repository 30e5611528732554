// Instantiates LARS for the CPU.
#include "optim/rules/lars.h"

#include "optim/launch.h"
#include "optim/tensor_step.h"

namespace mlsys {

void lars_step(const StepArguments& args) { step_tensors<LarsMeasure, LarsApply>(args); }

}  // namespace mlsys
