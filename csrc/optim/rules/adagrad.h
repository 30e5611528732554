// Adagrad with decaying learning rate and coupled weight decay: torch.optim.Adagrad. Duchi, Hazan & Singer
// 2011, figure 1, with the diagonal matrix.
//
// The first step starts from the initial accumulator value, whatever the state holds, so that fresh state can
// be zero like every other rule's. Inf and nan flow through.
#pragma once

#include "optim/rules/math.h"

namespace mlsys {

struct Adagrad {
  static constexpr int kNumStates = 1;                                // sum
  enum Hyper { kLr, kLrDecay, kWeightDecay, kEps, kInitial, kSign };  // kSign is -1 to maximise

  struct Scalars {
    float grad_scale, lr, decay, eps, keep, initial;
  };

  static MLSYS_HD Scalars prepare(const double* hyper, double step, double grad_scale) {
    const bool first = step <= 1.0;
    Scalars s;
    s.grad_scale = static_cast<float>(hyper[kSign] * grad_scale);
    s.lr = static_cast<float>(hyper[kLr] / (1.0 + (step - 1.0) * hyper[kLrDecay]));
    s.decay = static_cast<float>(hyper[kWeightDecay]);
    s.eps = static_cast<float>(hyper[kEps]);
    s.keep = first ? 0.0f : 1.0f;
    s.initial = first ? static_cast<float>(hyper[kInitial]) : 0.0f;
    return s;
  }

  static MLSYS_HD void update(const Scalars& s, float grad, float& param, float* state) {
    const float scaled = grad * s.grad_scale;
    const float g = s.decay != 0.0f ? scaled + s.decay * param : scaled;
    const float sum = s.keep * state[0] + s.initial + g * g;
    param = param - s.lr * (g / (square_root(sum) + s.eps));
    state[0] = sum;
  }
};

}  // namespace mlsys
