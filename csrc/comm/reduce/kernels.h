// The element loops of the reductions, one table for each element type and instruction set.
//
// Contract. Sources are dense arrays of the element type ("raw") or of its accumulator type ("partial": float
// for fp16 and bf16, otherwise the element type itself). Pointers may have any alignment that the element
// type allows, and a destination may be exactly one of the sources, but not overlap one otherwise. Rounding:
// every partial result is rounded in the accumulator type; fp16 and bf16 are rounded once more, by finish, to
// nearest even. Integers wrap. min and max propagate NaN as torch does; inf follows IEEE 754. Bool: sum and
// max are "or", product and min are "and". All instruction sets give the same bits. Reference:
// tests/native/reference.h; test: tests/native/test_reduce.cpp.
#pragma once

#include <cstddef>

#include "comm/communicator.h"
#include "core/cpu.h"

namespace mlsys::comm {

struct Kernels {
  // raw -> partial; the second form multiplies by `factor` first.
  void (*load)(const void* raw, void* partial, size_t count) = nullptr;
  void (*load_scaled)(const void* raw, void* partial, size_t count, double factor) = nullptr;
  // op(raw, raw) -> partial, and op(raw, raw) -> raw (rounded): the common case of two ranks in one pass.
  void (*load_pair)(const void* left, const void* right, void* partial, size_t count) = nullptr;
  void (*reduce_pair)(const void* left, const void* right, void* raw, size_t count) = nullptr;
  // op(partial, partial) -> partial.
  void (*merge)(const void* left, const void* right, void* partial, size_t count) = nullptr;
  // partial -> raw; the second form divides first.
  void (*finish)(const void* partial, void* raw, size_t count) = nullptr;
  void (*finish_divided)(const void* partial, void* raw, size_t count, double divisor) = nullptr;
  size_t partial_bytes = 0;
};

// Throws std::invalid_argument, with the way out, for a reduction that the type does not have: an average or
// a premultiplied sum of integers, bit operations on floating point.
Kernels kernels_for(ElementType dtype, ReduceOp op, SimdLevel level);

// One file per family of types, so that builds stay parallel. They return an empty table for other
// operations.
Kernels float_kernels(ElementType dtype, ReduceOp op, SimdLevel level);
Kernels half_kernels(ElementType dtype, ReduceOp op, SimdLevel level);
Kernels integer_kernels(ElementType dtype, ReduceOp op, SimdLevel level);

}  // namespace mlsys::comm
