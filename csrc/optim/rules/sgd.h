// Stochastic gradient descent with momentum, dampening, Nesterov and coupled weight decay, as
// torch.optim.SGD.
//
// Sutskever et al. 2013 in torch's form: the buffer holds the (dampened) sum of gradients, the learning rate
// is applied last, and the first step copies the gradient without dampening. Inf and nan flow through.
#pragma once

#include "optim/rules/math.h"

namespace mlsys {

struct SgdHyper {
  enum Hyper { kLr, kMomentum, kDampening, kWeightDecay, kNesterov, kSign };  // kSign is -1 to maximise

  struct Scalars {
    float grad_scale, lr, decay, momentum, take, lookahead;
    bool first, nesterov;
  };

  static MLSYS_HD Scalars prepare(const double* hyper, double step, double grad_scale) {
    Scalars s;
    s.grad_scale = static_cast<float>(hyper[kSign] * grad_scale);
    s.lr = static_cast<float>(hyper[kLr]);
    s.decay = static_cast<float>(hyper[kWeightDecay]);
    s.first = step <= 1.0;
    s.momentum = s.first ? 0.0f : static_cast<float>(hyper[kMomentum]);
    s.take = s.first ? 1.0f : static_cast<float>(1.0 - hyper[kDampening]);
    s.lookahead = static_cast<float>(hyper[kMomentum]);
    s.nesterov = hyper[kNesterov] != 0.0;
    return s;
  }

  // The test keeps an infinite parameter infinite without decay, as in torch; it is the same for all
  // elements.
  static MLSYS_HD float decayed(const Scalars& s, float grad, float param) {
    const float g = grad * s.grad_scale;
    return s.decay != 0.0f ? g + s.decay * param : g;
  }
};

// momentum == 0: no state, half the traffic.
struct PlainSgd : SgdHyper {
  static constexpr int kNumStates = 0;

  static MLSYS_HD void update(const Scalars& s, float grad, float& param, float*) {
    const float g = decayed(s, grad, param);
    param = param - s.lr * g;
  }
};

struct MomentumSgd : SgdHyper {
  static constexpr int kNumStates = 1;  // momentum_buffer

  static MLSYS_HD void update(const Scalars& s, float grad, float& param, float* state) {
    const float g = decayed(s, grad, param);
    const float buffer = s.momentum * state[0] + s.take * g;
    param = param - s.lr * (s.nesterov ? g + s.lookahead * buffer : buffer);
    state[0] = buffer;
  }
};

}  // namespace mlsys
