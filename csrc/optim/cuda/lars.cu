// Instantiates LARS for CUDA.
#include "optim/cuda/tensor_step.cuh"
#include "optim/rules/lars.h"

namespace mlsys::cuda {

void lars_step(const StepLaunch& launch) { launch_tensors<LarsMeasure, LarsApply>(launch, "lars_step"); }

}  // namespace mlsys::cuda
