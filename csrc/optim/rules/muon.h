// The elementwise parts of Muon, before and after the orthogonalisation. Jordan et al. 2024, "Muon: An
// optimizer for hidden layers in neural networks"; torch.optim.Muon's form of the momentum, a weighted mean.
//
// The products in between are torch's (mlsys_engine/optim/rules/orthogonal.py). Inf and nan flow through.
#pragma once

#include "optim/rules/math.h"

namespace mlsys {

// The "parameter" is where the matrix to orthogonalise is written; what it held is not read.
struct MuonMomentum {
  static constexpr int kNumStates = 1;         // momentum_buffer
  enum Hyper { kMomentum, kNesterov, kSign };  // kSign is -1 to maximise

  struct Scalars {
    float grad_scale, momentum, rest;
    bool nesterov;
  };

  static MLSYS_HD Scalars prepare(const double* hyper, double, double grad_scale) {
    Scalars s;
    s.grad_scale = static_cast<float>(hyper[kSign] * grad_scale);
    s.momentum = static_cast<float>(hyper[kMomentum]);
    s.rest = static_cast<float>(1.0 - hyper[kMomentum]);
    s.nesterov = hyper[kNesterov] != 0.0;
    return s;
  }

  static MLSYS_HD void update(const Scalars& s, float grad, float& param, float* state) {
    const float g = grad * s.grad_scale;
    const float buffer = s.momentum * state[0] + s.rest * g;
    param = s.nesterov ? s.rest * g + s.momentum * buffer : buffer;
    state[0] = buffer;
  }
};

// The "gradient" is the orthogonalised matrix.
struct MuonApply {
  static constexpr int kNumStates = 0;
  enum Hyper { kLr, kRatio, kWeightDecay };  // kRatio: of this shape, to the learning rate

  struct Scalars {
    float decay, step_size;
  };

  static MLSYS_HD Scalars prepare(const double* hyper, double, double grad_scale) {
    Scalars s;
    s.decay = static_cast<float>(1.0 - hyper[kLr] * hyper[kWeightDecay]);
    s.step_size = static_cast<float>(hyper[kLr] * hyper[kRatio] * grad_scale);
    return s;
  }

  static MLSYS_HD void update(const Scalars& s, float grad, float& param, float*) {
    param = param * s.decay - s.step_size * grad;
  }
};

}  // namespace mlsys
