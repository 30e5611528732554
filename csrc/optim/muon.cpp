// Instantiates the elementwise parts of Muon for the CPU.
#include "optim/rules/muon.h"

#include "optim/launch.h"
#include "optim/step.h"

namespace mlsys {

void muon_momentum_step(const StepArguments& args) { step_segments<MuonMomentum>(args); }
void muon_apply_step(const StepArguments& args) { step_segments<MuonApply>(args); }

}  // namespace mlsys
