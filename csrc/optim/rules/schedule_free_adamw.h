// Schedule-free AdamW. Defazio et al. 2024, "The Road Less Scheduled", algorithm 1.
//
// The paper has three sequences: z takes the steps, x averages z, and gradients are taken at y between them,
// y = (1 - beta1) z + beta1 x. The parameter holds y and the state z, so x is never stored:
//   z' = z - lr u,  x' = (1 - c) x + c z',  y' = (1 - c) y + c z - lr (1 - beta1 (1 - c)) u
// where u is Adam's gradient over the root of its second moment, plus decay y, and c is this step's share of
// the average (mlsys_engine/optim/rules/schedule_free_adamw.py). The first step takes z from the parameter.
// Inf and nan flow through.
#pragma once

#include "optim/rules/math.h"

namespace mlsys {

struct ScheduleFreeAdamW {
  static constexpr int kNumStates = 2;  // z, exp_avg_sq
  // kLr has its warm-up in it; kShare is c; kSign is -1 to maximise.
  enum Hyper { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kSign, kShare };

  struct Scalars {
    float grad_scale, lr, decay, beta2, rest2, inverse_bias2, eps, share, lr_of_y;
    bool first;
  };

  static MLSYS_HD Scalars prepare(const double* hyper, double step, double grad_scale) {
    const double bias2 = 1.0 - power(hyper[kBeta2], step);
    Scalars s;
    s.grad_scale = static_cast<float>(hyper[kSign] * grad_scale);
    s.lr = static_cast<float>(hyper[kLr]);
    s.decay = static_cast<float>(hyper[kWeightDecay]);
    s.beta2 = static_cast<float>(hyper[kBeta2]);
    s.rest2 = static_cast<float>(1.0 - hyper[kBeta2]);
    s.inverse_bias2 = static_cast<float>(1.0 / sqrt(bias2));
    s.eps = static_cast<float>(hyper[kEps]);
    s.share = static_cast<float>(hyper[kShare]);
    s.lr_of_y = static_cast<float>(hyper[kLr] * (1.0 - hyper[kBeta1] * (1.0 - hyper[kShare])));
    s.first = step <= 1.0;
    return s;
  }

  static MLSYS_HD void update(const Scalars& s, float grad, float& param, float* state) {
    const float g = grad * s.grad_scale;
    const float y = param;
    const float z = s.first ? y : state[0];
    const float second = s.beta2 * state[1] + s.rest2 * g * g;
    const float ratio = g / (square_root(second) * s.inverse_bias2 + s.eps);
    const float u = s.decay != 0.0f ? ratio + s.decay * y : ratio;
    param = y + s.share * (z - y) - s.lr_of_y * u;
    state[0] = z - s.lr * u;
    state[1] = second;
  }
};

}  // namespace mlsys
