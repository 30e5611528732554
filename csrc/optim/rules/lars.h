// LARS: momentum whose learning rate follows each tensor's own size. You, Gitman & Ginsburg 2017, "Large
// Batch Training of Convolutional Networks", algorithm 1: the momentum holds steps, learning rate included.
//
// Two sweeps (tensor_step.h): the first adds up |p|^2 and |g|^2, the second steps. A tensor of zeros, and one
// without gradient, take the learning rate as it is. An inf or nan in a gradient reaches the whole tensor,
// through its norm.
#pragma once

#include "optim/rules/math.h"

namespace mlsys {

struct LarsHyper {
  // kSign is -1 to maximise; kAdapt is 0 for tensors whose learning rate is not scaled.
  enum Hyper { kLr, kMomentum, kWeightDecay, kTrust, kNesterov, kSign, kAdapt };

  struct Scalars {
    float grad_scale, momentum, decay, rate;
    bool nesterov;
  };

  static MLSYS_HD Scalars prepare(const double* hyper, double, double grad_scale) {
    Scalars s;
    s.grad_scale = static_cast<float>(hyper[kSign] * grad_scale);
    s.momentum = static_cast<float>(hyper[kMomentum]);
    s.decay = static_cast<float>(hyper[kWeightDecay]);
    s.rate = static_cast<float>(hyper[kLr]);
    s.nesterov = hyper[kNesterov] != 0.0;
    return s;
  }
};

struct LarsMeasure : LarsHyper {
  static constexpr int kNumStates = 0;

  static MLSYS_HD float measure(const Scalars& s, float grad, float, float*) { return grad * s.grad_scale; }
};

struct LarsApply : LarsHyper {
  static constexpr int kNumStates = 1;  // momentum_buffer

  static MLSYS_HD Scalars prepare(const double* hyper, double step, double grad_scale, const double* sums) {
    Scalars s = LarsHyper::prepare(hyper, step, grad_scale);
    if (hyper[kAdapt] != 0.0 && sums[0] != 0.0 && sums[1] != 0.0) {
      const double size = sqrt(sums[0]);
      const double local = hyper[kTrust] * size / (sqrt(sums[1]) + hyper[kWeightDecay] * size);
      s.rate = static_cast<float>(hyper[kLr] * local);
    }
    return s;
  }

  static MLSYS_HD void update(const Scalars& s, float grad, float& param, float* state) {
    const float g = grad * s.grad_scale;
    const float step = s.rate * (s.decay != 0.0f ? g + s.decay * param : g);
    const float buffer = s.momentum * state[0] + step;
    param = param - (s.nesterov ? step + s.momentum * buffer : buffer);
    state[0] = buffer;
  }
};

}  // namespace mlsys
