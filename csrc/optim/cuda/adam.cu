// Instantiates Adam for CUDA.
#include "optim/cuda/step.cuh"
#include "optim/rules/adam.h"

namespace mlsys::cuda {

void adam_step(const StepLaunch& launch) { launch_step<Adam, AmsgradAdam>(launch, "adam_step"); }

}  // namespace mlsys::cuda
