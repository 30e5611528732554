// The table of the Adafactor step: one row a parameter, since its sums are over whole tensors.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "optim/segment.h"

namespace mlsys {

// A contiguous tensor [matrices, rows, cols]; a vector is one matrix of one row, with row_var == 0.
struct AdafactorTensor {
  int64_t param;    // address of the parameters, read and written
  int64_t grad;     // address of the gradients, read
  int64_t row_var;  // address of [matrices, rows]; 0 for a vector
  int64_t col_var;  // address of [matrices, cols]; of a vector's whole second moment
  int64_t matrices, rows, cols;
  int64_t hyper_row;   // row of the hyper-parameter table
  int64_t step_index;  // element of the step counts, already advanced for this step

  int64_t numel() const { return matrices * rows * cols; }
  template <class T>
  T* pointer(int64_t address) const {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
  }
};
constexpr int64_t kAdafactorColumns = 9;
static_assert(sizeof(AdafactorTensor) == kAdafactorColumns * sizeof(int64_t));

struct AdafactorArguments {
  const AdafactorTensor* tensors;
  int64_t num_tensors;
  const double* hyper;  // [rows, kHyperColumns]
  const float* steps;
  double grad_scale;  // gradients are multiplied by it as they are read
  ParallelFor pool;
};

void adafactor_step(const AdafactorArguments& args);

}  // namespace mlsys
