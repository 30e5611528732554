// LAMB: Adam's update, with decay in it, scaled to each tensor's own size. You et al. 2020, "Large Batch
// Optimization for Deep Learning: Training BERT in 76 minutes", algorithm 2, with phi the identity.
//
// Two sweeps (tensor_step.h): the first moves the moments and measures |p| and |u|, the second computes u
// again from the moments, which costs 12 bytes an element less than keeping it. A tensor of zeros, and an
// update of zeros, are not scaled. An inf or nan in a gradient reaches the whole tensor, through its norm.
#pragma once

#include "optim/rules/math.h"

namespace mlsys {

struct LambHyper {
  // kSign is -1 to maximise; kAdapt is 0 for tensors that are not scaled.
  enum Hyper { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kSign, kAdapt };

  struct Scalars {
    float grad_scale, beta1, rest1, beta2, rest2, root_scale, eps, decay, step_size;
  };

  static MLSYS_HD Scalars prepare(const double* hyper, double step, double grad_scale) {
    Scalars s;
    s.grad_scale = static_cast<float>(hyper[kSign] * grad_scale);
    s.beta1 = static_cast<float>(hyper[kBeta1]);
    s.rest1 = static_cast<float>(1.0 - hyper[kBeta1]);
    s.beta2 = static_cast<float>(hyper[kBeta2]);
    s.rest2 = static_cast<float>(1.0 - hyper[kBeta2]);
    // m / bias1 / (sqrt(v / bias2) + eps), with bias1 taken into the divisor.
    const double bias1 = 1.0 - power(hyper[kBeta1], step);
    const double bias2 = 1.0 - power(hyper[kBeta2], step);
    s.root_scale = static_cast<float>(bias1 / sqrt(bias2));
    s.eps = static_cast<float>(bias1 * hyper[kEps]);
    s.decay = static_cast<float>(hyper[kWeightDecay]);
    s.step_size = static_cast<float>(hyper[kLr]);
    return s;
  }

  static MLSYS_HD float direction(const Scalars& s, float param, const float* state) {
    const float ratio = state[0] / (square_root(state[1]) * s.root_scale + s.eps);
    return s.decay != 0.0f ? ratio + s.decay * param : ratio;
  }
};

struct LambMeasure : LambHyper {
  static constexpr int kNumStates = 2;  // exp_avg, exp_avg_sq

  static MLSYS_HD float measure(const Scalars& s, float grad, float param, float* state) {
    const float g = grad * s.grad_scale;
    state[0] = s.beta1 * state[0] + s.rest1 * g;
    state[1] = s.beta2 * state[1] + s.rest2 * g * g;
    return direction(s, param, state);
  }
};

struct LambApply : LambHyper {
  static constexpr int kNumStates = 2;
  static constexpr bool kOnlyParam = true;  // moments are read, the gradient is not

  static MLSYS_HD Scalars prepare(const double* hyper, double step, double grad_scale, const double* sums) {
    Scalars s = LambHyper::prepare(hyper, step, grad_scale);
    const bool scaled = hyper[kAdapt] != 0.0 && sums[0] != 0.0 && sums[1] != 0.0;
    s.step_size = static_cast<float>(scaled ? hyper[kLr] * sqrt(sums[0] / sums[1]) : hyper[kLr]);
    return s;
  }

  static MLSYS_HD void update(const Scalars& s, float, float& param, float* state) {
    param = param - s.step_size * direction(s, param, state);
  }
};

}  // namespace mlsys
