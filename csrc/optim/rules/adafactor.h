// Adafactor with torch.optim.Adafactor's reading of it. Shazeer & Stern 2018, algorithms 4 and 5.
//
// The second moment of a matrix is kept as the means of its rows and of its columns, that of a vector whole.
// The step size is relative to the parameter's root mean square, and the update is clipped by its own. How
// the means and sums are taken is in csrc/optim/adafactor.cpp; here are the scalars and one element's
// formulas. Inf and nan flow through the means, and so into the whole matrix.
#pragma once

#include "optim/rules/math.h"

namespace mlsys {

struct Adafactor {
  enum Hyper { kLr, kBeta2Decay, kEps1, kEps2, kThreshold, kWeightDecay, kSign };  // kSign: -1 to maximise

  struct Scalars {
    float grad_scale, take, smallest_mean, smallest_variance, decay;
    double relative_rate, smallest_rms, threshold;
  };

  static Scalars prepare(const double* hyper, double step, double grad_scale) {
    Scalars s;
    s.grad_scale = static_cast<float>(hyper[kSign] * grad_scale);
    s.take = static_cast<float>(std::pow(step, hyper[kBeta2Decay]));
    s.smallest_mean = static_cast<float>(hyper[kEps1]);
    s.smallest_variance = static_cast<float>(hyper[kEps1] * hyper[kEps1]);
    s.decay = static_cast<float>(1.0 - hyper[kLr] * hyper[kWeightDecay]);
    const double rate = 1.0 / std::sqrt(step);
    s.relative_rate = hyper[kLr] < rate ? hyper[kLr] : rate;
    s.smallest_rms = hyper[kEps2];
    s.threshold = hyper[kThreshold];
    return s;
  }

  // What the update is multiplied by, from the sums of squares of parameter and update over `numel` elements.
  static float step_size(const Scalars& s, double param_squares, double update_squares, double numel) {
    const double param_rms = std::sqrt(param_squares / numel);
    const double clipped = std::sqrt(update_squares / numel) / s.threshold;
    const double alpha = (param_rms > s.smallest_rms ? param_rms : s.smallest_rms) * s.relative_rate;
    return static_cast<float>(alpha / (clipped > 1.0 ? clipped : 1.0));
  }

  static MLSYS_HD float moved(const Scalars& s, float mean, float sample) {
    return mean + s.take * (sample - mean);
  }

  static MLSYS_HD float update(const Scalars& s, float g, float variance) {
    return g / square_root(variance < s.smallest_variance ? s.smallest_variance : variance);
  }
};

}  // namespace mlsys
