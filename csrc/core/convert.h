// Converts arrays between float32 and the 16-bit types of half.h, with the best instruction set.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace mlsys {

// float32 to bfloat16 or float16 (round to nearest even), or one of those to float32 (exact). The arrays do
// not overlap. Throws std::invalid_argument for any other pair of types. Test: tests/core/test_half.py.
void convert(const void* from, DType from_type, void* to, DType to_type, int64_t count);

}  // namespace mlsys
