// Instantiates LAMB for CUDA.
#include "optim/cuda/tensor_step.cuh"
#include "optim/rules/lamb.h"

namespace mlsys::cuda {

void lamb_step(const StepLaunch& launch) { launch_tensors<LambMeasure, LambApply>(launch, "lamb_step"); }

}  // namespace mlsys::cuda
