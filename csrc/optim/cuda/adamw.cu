// Instantiates AdamW for CUDA.
#include "optim/cuda/step.cuh"
#include "optim/rules/adamw.h"

namespace mlsys::cuda {

void adamw_step(const StepLaunch& launch) { launch_step<AdamW, AmsgradAdamW>(launch, "adamw_step"); }

}  // namespace mlsys::cuda
