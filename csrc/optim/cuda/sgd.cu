// Instantiates SGD for CUDA.
#include "optim/cuda/step.cuh"
#include "optim/rules/sgd.h"

namespace mlsys::cuda {

void sgd_step(const StepLaunch& launch) { launch_step<PlainSgd, MomentumSgd>(launch, "sgd_step"); }

}  // namespace mlsys::cuda
