// AdamW: Adam with decoupled weight decay. Loshchilov & Hutter 2019, algorithm 2; torch.optim.AdamW. AMSGrad,
// which divides by the largest second moment so far: Reddi, Kale & Kumar 2018, algorithm 2.
//
// Inf and nan in a gradient flow into the moments and the parameter, as they do in torch.
#pragma once

#include "optim/rules/math.h"

namespace mlsys {

struct AdamWHyper {
  enum Hyper { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kSign };  // kSign is -1 to maximise

  struct Scalars {
    float grad_scale, decay, beta1, rest1, beta2, rest2, step_size, inverse_bias2, eps;
  };

  static MLSYS_HD Scalars prepare(const double* hyper, double step, double grad_scale) {
    const double bias1 = 1.0 - power(hyper[kBeta1], step);
    const double bias2 = 1.0 - power(hyper[kBeta2], step);
    Scalars s;
    s.grad_scale = static_cast<float>(hyper[kSign] * grad_scale);
    s.decay = static_cast<float>(1.0 - hyper[kLr] * hyper[kWeightDecay]);
    s.beta1 = static_cast<float>(hyper[kBeta1]);
    s.rest1 = static_cast<float>(1.0 - hyper[kBeta1]);
    s.beta2 = static_cast<float>(hyper[kBeta2]);
    s.rest2 = static_cast<float>(1.0 - hyper[kBeta2]);
    s.step_size = static_cast<float>(hyper[kLr] / bias1);
    s.inverse_bias2 = static_cast<float>(1.0 / sqrt(bias2));
    s.eps = static_cast<float>(hyper[kEps]);
    return s;
  }

  // `g` is the gradient that enters the moments.
  static MLSYS_HD void advance_moments(const Scalars& s, float g, float* state) {
    state[0] = s.beta1 * state[0] + s.rest1 * g;
    state[1] = s.beta2 * state[1] + s.rest2 * g * g;
  }

  // A nan that is in either of the two stays.
  static MLSYS_HD void keep_larger(float& largest, float second) {
    largest = second > largest || second != second ? second : largest;
  }

  static MLSYS_HD float stepped(const Scalars& s, float param, float first, float second) {
    const float denominator = square_root(second) * s.inverse_bias2 + s.eps;
    return param * s.decay - s.step_size * (first / denominator);
  }
};

struct AdamW : AdamWHyper {
  static constexpr int kNumStates = 2;  // exp_avg, exp_avg_sq

  static MLSYS_HD void update(const Scalars& s, float grad, float& param, float* state) {
    advance_moments(s, grad * s.grad_scale, state);
    param = stepped(s, param, state[0], state[1]);
  }
};

struct AmsgradAdamW : AdamWHyper {
  static constexpr int kNumStates = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq

  static MLSYS_HD void update(const Scalars& s, float grad, float& param, float* state) {
    advance_moments(s, grad * s.grad_scale, state);
    keep_larger(state[2], state[1]);
    param = stepped(s, param, state[0], state[2]);
  }
};

}  // namespace mlsys
