// Instantiates schedule-free AdamW for CUDA.
#include "optim/cuda/step.cuh"
#include "optim/rules/schedule_free_adamw.h"

namespace mlsys::cuda {

void schedule_free_adamw_step(const StepLaunch& launch) {
  launch_step<ScheduleFreeAdamW>(launch, "schedule_free_adamw_step");
}

}  // namespace mlsys::cuda
