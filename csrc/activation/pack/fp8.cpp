// float32, bfloat16 and float16 in blocks of 64 as e4m3 floats: see blocks.h and codes.h.
#include "activation/pack/blocks.h"

namespace mlsys::packing {

void pack_fp8(const Job& job) { pack_in_blocks<Fp8>(job); }
void unpack_fp8(const Job& job) { unpack_in_blocks<Fp8>(job); }

}  // namespace mlsys::packing
