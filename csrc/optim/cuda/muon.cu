// Instantiates the elementwise parts of Muon for CUDA.
#include "optim/cuda/step.cuh"
#include "optim/rules/muon.h"

namespace mlsys::cuda {

void muon_momentum_step(const StepLaunch& launch) { launch_step<MuonMomentum>(launch, "muon_momentum_step"); }
void muon_apply_step(const StepLaunch& launch) { launch_step<MuonApply>(launch, "muon_apply_step"); }

}  // namespace mlsys::cuda
