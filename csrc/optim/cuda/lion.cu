// Instantiates Lion for CUDA.
#include "optim/cuda/step.cuh"
#include "optim/rules/lion.h"

namespace mlsys::cuda {

void lion_step(const StepLaunch& launch) { launch_step<Lion>(launch, "lion_step"); }

}  // namespace mlsys::cuda
