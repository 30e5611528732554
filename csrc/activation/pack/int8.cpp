// float32, bfloat16 and float16 in blocks of 64 as whole numbers of steps: see blocks.h and codes.h.
#include "activation/pack/blocks.h"

namespace mlsys::packing {

void pack_int8(const Job& job) { pack_in_blocks<Int8>(job); }
void unpack_int8(const Job& job) { unpack_in_blocks<Int8>(job); }

}  // namespace mlsys::packing
