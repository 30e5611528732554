// One reduction, ready to run on blocks: its kernels, its scaling, and the order in which ranks are combined.
//
// Order. Sources are combined as a balanced binary tree over their index, left operand first:
// ((x0 x1)(x2 x3))(x4 x5) ... The tree depends on the number of sources alone, never on timing, block sizes
// or where the data lies, so every way of running a reduction gives the same bits.
#pragma once

#include <cstddef>
#include <span>

#include "comm/communicator.h"
#include "comm/reduce/kernels.h"

namespace mlsys::comm {

class Reducer {
 public:
  // Throws std::invalid_argument for a reduction that the element type does not have.
  Reducer(const Reduction& reduction, int group_size);

  size_t element_bytes() const { return element_bytes_; }
  size_t partial_bytes() const { return kernels_.partial_bytes; }
  // True when partials are elements (no wider accumulator, no scaling when loading), so that a ring may work
  // in place; finish() is then an in-place division, or nothing.
  bool partial_is_element() const;
  bool divides() const { return op_ == ReduceOp::kAvg; }

  // All contributions -> the result, written to every destination. A destination may be one of the sources.
  void reduce(std::span<const void* const> sources, std::span<void* const> destinations, size_t count) const;
  // Contributions -> one partial (unscaled, unrounded).
  void reduce_to_partial(std::span<const void* const> sources, void* partial, size_t count) const;
  // Partials -> the result.
  void combine_partials(std::span<const void* const> partials, void* destination, size_t count) const;
  // target = op(left, right) on partials.
  void merge(const void* left, const void* right, void* target, size_t count) const {
    kernels_.merge(left, right, target, count);
  }
  void finish(const void* partial, void* destination, size_t count) const;

 private:
  Kernels kernels_;
  ReduceOp op_;
  double factor_;
  double group_size_;
  bool is_bool_;
  size_t element_bytes_;
};

}  // namespace mlsys::comm
