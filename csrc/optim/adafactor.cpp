// The Adafactor step on the CPU: three sweeps over the gradient, two over the parameter, 24 bytes an element.
//
// Layout: csrc/optim/adafactor.h, float32. Sums are in double. Order, which alone decides the bits: a matrix
// is cut into blocks of rows by its shape alone, a vector into chunks; inside a row, lane j of kLanes adds
// elements j, j + kLanes, ... in turn, and lanes are added in a binary tree; columns and rows are added from
// top to bottom inside a block, then block by block. So the result depends on neither threads nor instruction
// set. Inf and nan: rules/adafactor.h. Reference: mlsys_engine/optim/reference.py; tests:
// tests/optim/rules/test_adafactor.py.
#include "optim/adafactor.h"

#include <algorithm>
#include <vector>

#include "core/simd_dispatch.h"
#include "optim/rules/adafactor.h"

namespace mlsys {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kBlockRows = 64;         // keeps the blocks' column sums small beside the matrix
constexpr int64_t kBlockElements = 16384;  // and narrow matrices from falling into tiny blocks

using Scalars = Adafactor::Scalars;

// The rows [first, end) of one matrix of a tensor, or the elements [first, end) of a vector.
struct Block {
  int64_t tensor, matrix, first, end;
  int64_t column_sums;  // where its own begin
};

struct Sums {
  double param = 0.0, update = 0.0;
};

MLSYS_INLINE double tree(double (&lanes)[kLanes]) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// Calls element(i, lane) for all i below count, lane i % kLanes, in an order that vectorises.
template <class Element>
MLSYS_INLINE void in_lanes(int64_t count, Element&& element) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) element(i + j, j);
  }
  for (int j = 0; i < count; ++i, ++j) element(i, j);
}

// Squares of one row of gradient, into the row's sum and onto the columns' sums, and of its parameters.
struct MeasureRow {
  MLSYS_INLINE void operator()(const Scalars& s, const float* __restrict grad, const float* __restrict param,
                               int64_t cols, double* __restrict columns, double* row, double* params) const {
    double of_grad[kLanes] = {}, of_param[kLanes] = {};
    const float scale = s.grad_scale;
    in_lanes(cols, [&](int64_t i, int j) {
      const double g = grad[i] * scale, p = param[i];
      const double square = g * g;
      of_grad[j] += square;
      of_param[j] += p * p;
      columns[i] += square;
    });
    *row = tree(of_grad);
    *params += tree(of_param);
  }
};

// A stretch of a vector: its second moment, and the squares of parameter and update.
struct MeasureVector {
  MLSYS_INLINE void operator()(const Scalars& scalars, const float* __restrict grad,
                               const float* __restrict param, int64_t count, float* __restrict variance,
                               Sums* sums) const {
    const Scalars s = scalars;
    double of_update[kLanes] = {}, of_param[kLanes] = {};
    in_lanes(count, [&](int64_t i, int j) {
      const float g = grad[i] * s.grad_scale;
      variance[i] = Adafactor::moved(s, variance[i], g * g);
      const double u = Adafactor::update(s, g, variance[i]), p = param[i];
      of_update[j] += u * u;
      of_param[j] += p * p;
    });
    sums->update = tree(of_update);
    sums->param = tree(of_param);
  }
};

// The element's variance is row * col[i]; for a vector row is 1 and col its second moment.
struct SquareUpdates {
  MLSYS_INLINE void operator()(const Scalars& scalars, const float* __restrict grad,
                               const float* __restrict col, float row, int64_t count, double* sum) const {
    const Scalars s = scalars;
    double lanes[kLanes] = {};
    in_lanes(count, [&](int64_t i, int j) {
      const double u = Adafactor::update(s, grad[i] * s.grad_scale, row * col[i]);
      lanes[j] += u * u;
    });
    *sum += tree(lanes);
  }
};

struct ApplyUpdates {
  MLSYS_INLINE void operator()(const Scalars& scalars, const float* __restrict grad,
                               const float* __restrict col, float row, float step_size, int64_t count,
                               float* __restrict param) const {
    const Scalars s = scalars;
    for (int64_t i = 0; i < count; ++i) {
      param[i] = param[i] * s.decay - step_size * Adafactor::update(s, grad[i] * s.grad_scale, row * col[i]);
    }
  }
};

class Step {
 public:
  explicit Step(const AdafactorArguments& args) : args_(args), level_(simd_level()) {
    for (int64_t i = 0; i < args.num_tensors; ++i) add(i);
    column_sums_.assign(static_cast<size_t>(num_column_sums_), 0.0);
    row_sums_.resize(static_cast<size_t>(num_rows_));
    row_factors_.resize(static_cast<size_t>(num_rows_));
    sums_.resize(blocks_.size());
    step_sizes_.resize(static_cast<size_t>(args.num_tensors));
  }

  void run() {
    for_blocks([&](const Block& block, Sums& sums) { measure(block, sums); });
    parallel_for(args_.pool, args_.num_tensors, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) move_means(i);
    });
    for_blocks([&](const Block& block, Sums& sums) { square(block, sums); });
    for (int64_t i = 0; i < args_.num_tensors; ++i) {
      Sums total;
      for (int64_t b = first_block_[i]; b < first_block_[i + 1]; ++b) {
        total.param += sums_[b].param;
        total.update += sums_[b].update;
      }
      step_sizes_[i] = Adafactor::step_size(scalars_[i], total.param, total.update,
                                            static_cast<double>(args_.tensors[i].numel()));
    }
    for_blocks([&](const Block& block, Sums&) { apply(block); });
  }

 private:
  void add(int64_t index) {
    const AdafactorTensor& t = args_.tensors[index];
    const bool vector = t.row_var == 0;
    const int64_t length = vector ? t.cols : t.rows;
    const int64_t by_size = t.cols == 0 ? 1 : (kBlockElements + t.cols - 1) / t.cols;
    const int64_t step = vector ? kBlockElements : std::max(kBlockRows, by_size);
    for (int64_t matrix = 0; t.numel() != 0 && matrix < t.matrices; ++matrix) {
      for (int64_t first = 0; first < length; first += step) {
        blocks_.push_back({index, matrix, first, std::min(first + step, length), num_column_sums_});
        if (!vector) num_column_sums_ += t.cols;
      }
    }
    first_block_.push_back(static_cast<int64_t>(blocks_.size()));
    first_row_.push_back(num_rows_);
    if (!vector) num_rows_ += t.matrices * t.rows;
    scalars_.push_back(Adafactor::prepare(args_.hyper + t.hyper_row * kHyperColumns,
                                          args_.steps[t.step_index], args_.grad_scale));
  }

  template <class Visit>
  void for_blocks(Visit&& visit) {
    parallel_for(args_.pool, static_cast<int64_t>(blocks_.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) visit(blocks_[b], sums_[b]);
    });
  }

  void measure(const Block& block, Sums& sums) {
    const AdafactorTensor& t = args_.tensors[block.tensor];
    const Scalars& s = scalars_[block.tensor];
    const auto* grad = t.pointer<const float>(t.grad);
    const auto* param = t.pointer<const float>(t.param);
    if (t.row_var == 0) {
      run_simd(level_, MeasureVector{}, s, grad + block.first, param + block.first, block.end - block.first,
               t.pointer<float>(t.col_var) + block.first, &sums);
      return;
    }
    for (int64_t row = block.first; row < block.end; ++row) {
      const int64_t line = block.matrix * t.rows + row;
      run_simd(level_, MeasureRow{}, s, grad + line * t.cols, param + line * t.cols, t.cols,
               &column_sums_[block.column_sums], &row_sums_[first_row_[block.tensor] + line], &sums.param);
    }
  }

  // Moves a tensor's row and column means to this step's, and makes each row's factor of the variance.
  void move_means(int64_t index) {
    const AdafactorTensor& t = args_.tensors[index];
    if (t.row_var == 0 || t.numel() == 0) return;
    const Scalars& s = scalars_[index];
    int64_t b = first_block_[index];
    for (int64_t matrix = 0; matrix < t.matrices; ++matrix) {
      double* total = &column_sums_[blocks_[b].column_sums];
      for (++b; b < first_block_[index + 1] && blocks_[b].matrix == matrix; ++b) {
        const double* part = &column_sums_[blocks_[b].column_sums];
        for (int64_t i = 0; i < t.cols; ++i) total[i] += part[i];
      }
      float* col_var = t.pointer<float>(t.col_var) + matrix * t.cols;
      const auto rows = static_cast<double>(t.rows), cols = static_cast<double>(t.cols);
      for (int64_t i = 0; i < t.cols; ++i) {
        col_var[i] = Adafactor::moved(s, col_var[i], static_cast<float>(total[i] / rows));
      }
      float* row_var = t.pointer<float>(t.row_var) + matrix * t.rows;
      const int64_t first = first_row_[index] + matrix * t.rows;
      double sum = 0.0;
      for (int64_t i = 0; i < t.rows; ++i) {
        row_var[i] = Adafactor::moved(s, row_var[i], static_cast<float>(row_sums_[first + i] / cols));
        sum += row_var[i];
      }
      const auto mean = static_cast<float>(sum / rows);
      const float divisor = mean < s.smallest_mean ? s.smallest_mean : mean;
      for (int64_t i = 0; i < t.rows; ++i) row_factors_[first + i] = row_var[i] / divisor;
    }
  }

  void square(const Block& block, Sums& sums) {
    const AdafactorTensor& t = args_.tensors[block.tensor];
    if (t.row_var == 0) return;  // measure() has done it
    const float* col = t.pointer<const float>(t.col_var) + block.matrix * t.cols;
    for (int64_t row = block.first; row < block.end; ++row) {
      const int64_t line = block.matrix * t.rows + row;
      run_simd(level_, SquareUpdates{}, scalars_[block.tensor],
               t.pointer<const float>(t.grad) + line * t.cols, col,
               row_factors_[first_row_[block.tensor] + line], t.cols, &sums.update);
    }
  }

  void apply(const Block& block) {
    const AdafactorTensor& t = args_.tensors[block.tensor];
    const Scalars& s = scalars_[block.tensor];
    const float size = step_sizes_[block.tensor];
    const auto* grad = t.pointer<const float>(t.grad);
    const auto* col = t.pointer<const float>(t.col_var);
    auto* param = t.pointer<float>(t.param);
    if (t.row_var == 0) {
      run_simd(level_, ApplyUpdates{}, s, grad + block.first, col + block.first, 1.0f, size,
               block.end - block.first, param + block.first);
      return;
    }
    for (int64_t row = block.first; row < block.end; ++row) {
      const int64_t line = block.matrix * t.rows + row;
      run_simd(level_, ApplyUpdates{}, s, grad + line * t.cols, col + block.matrix * t.cols,
               row_factors_[first_row_[block.tensor] + line], size, t.cols, param + line * t.cols);
    }
  }

  const AdafactorArguments args_;
  const SimdLevel level_;
  std::vector<Scalars> scalars_;         // of each tensor
  std::vector<int64_t> first_block_{0};  // of each tensor, and one past the last
  std::vector<int64_t> first_row_;       // of each tensor, among all matrices' rows
  std::vector<Block> blocks_;
  int64_t num_column_sums_ = 0, num_rows_ = 0;
  std::vector<double> column_sums_, row_sums_;
  std::vector<float> row_factors_;  // row_var over its mean
  std::vector<Sums> sums_;          // of each block
  std::vector<float> step_sizes_;   // of each tensor
};

}  // namespace

void adafactor_step(const AdafactorArguments& args) { Step(args).run(); }

}  // namespace mlsys
