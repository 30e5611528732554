// The packing kernels that the binding calls. No torch, no CUDA headers: a CUDA stream is a void*.
#pragma once

#include <cstdint>

#include "activation/pack/forms.h"
#include "core/parallel.h"

namespace mlsys::packing {

// `numel` elements of `dtype` at `from`, packed at `to`; the other way round when unpacking.
struct Job {
  Form form;
  DType dtype;
  const void* from;
  void* to;
  int64_t numel;
  int64_t seed;  // of int8 and fp8, when packing
  ParallelFor pool;
};
// Throw std::invalid_argument when the form does not take the dtype.
void pack(const Job& job);
void unpack(const Job& job);

// One form each, in the file of its name.
void pack_mask(const Job& job);
void unpack_mask(const Job& job);
void pack_positive(const Job& job);
void unpack_positive(const Job& job);
void pack_bfloat16(const Job& job);
void unpack_bfloat16(const Job& job);
void pack_int8(const Job& job);
void unpack_int8(const Job& job);
void pack_fp8(const Job& job);
void unpack_fp8(const Job& job);

namespace cuda {

// The same on the device of both arrays. Throw std::runtime_error with CUDA's words when a launch fails.
struct Launch {
  Form form;
  DType dtype;
  const void* from;
  void* to;
  int64_t numel;
  int64_t seed;
  void* stream;
};
void pack(const Launch& launch);
void unpack(const Launch& launch);

void pack_bits(const Launch& launch);  // mask and positive
void unpack_bits(const Launch& launch);
void pack_bfloat16(const Launch& launch);
void unpack_bfloat16(const Launch& launch);
void pack_blocks(const Launch& launch);  // int8 and fp8
void unpack_blocks(const Launch& launch);

}  // namespace cuda
}  // namespace mlsys::packing
