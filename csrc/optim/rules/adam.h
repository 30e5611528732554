// Adam with coupled weight decay, or decoupled on request: torch.optim.Adam. Kingma & Ba 2015, algorithm 1.
//
// Coupled decay adds to the gradient before the moments see it. Inf and nan flow through, as in torch.
#pragma once

#include "optim/rules/adamw.h"

namespace mlsys {

struct AdamHyper {
  enum Hyper { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kSign, kDecoupled };  // the first six as AdamW's

  struct Scalars : AdamWHyper::Scalars {
    float coupled;
  };

  static MLSYS_HD Scalars prepare(const double* hyper, double step, double grad_scale) {
    Scalars s;
    static_cast<AdamWHyper::Scalars&>(s) = AdamWHyper::prepare(hyper, step, grad_scale);
    const bool decoupled = hyper[kDecoupled] != 0.0;
    s.coupled = decoupled ? 0.0f : static_cast<float>(hyper[kWeightDecay]);
    s.decay = decoupled ? s.decay : 1.0f;
    return s;
  }

  // The test keeps an infinite parameter infinite without decay; it is the same for all elements.
  static MLSYS_HD float decayed(const Scalars& s, float grad, float param) {
    const float g = grad * s.grad_scale;
    return s.coupled != 0.0f ? g + s.coupled * param : g;
  }
};

struct Adam : AdamHyper {
  static constexpr int kNumStates = 2;  // exp_avg, exp_avg_sq

  static MLSYS_HD void update(const Scalars& s, float grad, float& param, float* state) {
    AdamWHyper::advance_moments(s, decayed(s, grad, param), state);
    param = AdamWHyper::stepped(s, param, state[0], state[1]);
  }
};

struct AmsgradAdam : AdamHyper {
  static constexpr int kNumStates = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq

  static MLSYS_HD void update(const Scalars& s, float grad, float& param, float* state) {
    AdamWHyper::advance_moments(s, decayed(s, grad, param), state);
    AdamWHyper::keep_larger(state[2], state[1]);
    param = AdamWHyper::stepped(s, param, state[0], state[2]);
  }
};

}  // namespace mlsys
