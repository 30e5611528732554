// Which kernel packs and unpacks which form on CUDA.
#include "activation/pack/launch.h"

namespace mlsys::packing::cuda {

void pack(const Launch& job) {
  if (!takes(job.form, job.dtype)) refuse(job.form, job.dtype);
  switch (job.form) {
    case Form::kMask:
    case Form::kPositive:
      return pack_bits(job);
    case Form::kBFloat16:
      return pack_bfloat16(job);
    case Form::kInt8:
    case Form::kFp8:
      return pack_blocks(job);
  }
}

void unpack(const Launch& job) {
  if (!takes(job.form, job.dtype)) refuse(job.form, job.dtype);
  switch (job.form) {
    case Form::kMask:
    case Form::kPositive:
      return unpack_bits(job);
    case Form::kBFloat16:
      return unpack_bfloat16(job);
    case Form::kInt8:
    case Form::kFp8:
      return unpack_blocks(job);
  }
}

}  // namespace mlsys::packing::cuda
