// Which kernel packs and unpacks which form. simd_level() is called here because it throws for a bad
// MLSYS_SIMD, which nothing inside the pool may do.
#include "activation/pack/launch.h"
#include "core/cpu.h"

namespace mlsys::packing {

void pack(const Job& job) {
  if (!takes(job.form, job.dtype)) refuse(job.form, job.dtype);
  simd_level();
  switch (job.form) {
    case Form::kMask:
      return pack_mask(job);
    case Form::kPositive:
      return pack_positive(job);
    case Form::kBFloat16:
      return pack_bfloat16(job);
    case Form::kInt8:
      return pack_int8(job);
    case Form::kFp8:
      return pack_fp8(job);
  }
}

void unpack(const Job& job) {
  if (!takes(job.form, job.dtype)) refuse(job.form, job.dtype);
  simd_level();
  switch (job.form) {
    case Form::kMask:
      return unpack_mask(job);
    case Form::kPositive:
      return unpack_positive(job);
    case Form::kBFloat16:
      return unpack_bfloat16(job);
    case Form::kInt8:
      return unpack_int8(job);
    case Form::kFp8:
      return unpack_fp8(job);
  }
}

}  // namespace mlsys::packing
