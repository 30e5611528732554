// Instantiates Adagrad for CUDA.
#include "optim/cuda/step.cuh"
#include "optim/rules/adagrad.h"

namespace mlsys::cuda {

void adagrad_step(const StepLaunch& launch) { launch_step<Adagrad>(launch, "adagrad_step"); }

}  // namespace mlsys::cuda
