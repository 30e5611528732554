// Lion: the sign of an interpolation between momentum and gradient, with decoupled weight decay. Chen et al.
// 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2.
//
// The sign of zero is zero. A nan stays nan, so that a bad gradient shows in the parameter; an infinite
// gradient steps like any other once, and is inf in the momentum from then on.
#pragma once

#include "optim/rules/math.h"

namespace mlsys {

struct Lion {
  static constexpr int kNumStates = 1;                      // exp_avg
  enum Hyper { kLr, kBeta1, kBeta2, kWeightDecay, kSign };  // kSign is -1 to maximise

  struct Scalars {
    float grad_scale, lr, decay, beta1, rest1, beta2, rest2;
  };

  static MLSYS_HD Scalars prepare(const double* hyper, double, double grad_scale) {
    Scalars s;
    s.grad_scale = static_cast<float>(hyper[kSign] * grad_scale);
    s.lr = static_cast<float>(hyper[kLr]);
    s.decay = static_cast<float>(1.0 - hyper[kLr] * hyper[kWeightDecay]);
    s.beta1 = static_cast<float>(hyper[kBeta1]);
    s.rest1 = static_cast<float>(1.0 - hyper[kBeta1]);
    s.beta2 = static_cast<float>(hyper[kBeta2]);
    s.rest2 = static_cast<float>(1.0 - hyper[kBeta2]);
    return s;
  }

  static MLSYS_HD float sign(float value) { return value > 0.0f ? 1.0f : value < 0.0f ? -1.0f : value; }

  static MLSYS_HD void update(const Scalars& s, float grad, float& param, float* state) {
    const float g = grad * s.grad_scale;
    const float direction = sign(s.beta1 * state[0] + s.rest1 * g);
    param = param * s.decay - s.lr * direction;
    state[0] = s.beta2 * state[0] + s.rest2 * g;
  }
};

}  // namespace mlsys
