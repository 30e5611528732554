// Blocks of 64 elements that share a step, on CUDA: four threads a block, each with four neighbours of every
// quarter, which are the codes of four whole words.
//
// Formulas, rounding, inf and nan in codes.h, layout in forms.h; the bits are those of ../blocks.h, but for
// the payload of a nan; any alignment of the elements. The four threads agree on the largest by shuffles, so
// all threads of a warp come along, also those past the end, whose elements are zeros. Test:
// tests/activation/test_packing_cuda.py (marker gpu).
#include "activation/pack/codes.h"
#include "activation/pack/cuda/vectors.cuh"

namespace mlsys::packing::cuda {
namespace {

constexpr int kOfThread = 16;
constexpr int kThreadsOfBlock = 4;  // neighbours in a warp

// The largest of the four threads' values.
__device__ __forceinline__ uint32_t agreed(uint32_t value) {
#pragma unroll
  for (int distance = 1; distance < kThreadsOfBlock; distance *= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

template <class Codes, class T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const T* from, uint32_t* words, float* steps, int64_t numel, DrawKey key, bool aligned) {
  const int64_t block = thread_index() / kThreadsOfBlock;
  const int quad = static_cast<int>(threadIdx.x % kThreadsOfBlock);
  float values[4][4];
  uint32_t largest = 0, largest_finite_one = 0;
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const auto loaded = load<T, 4>(from, block * kBlock + part * kWords + quad * 4, numel, aligned);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[part][i] = to_float(loaded.at[i]);
      const uint32_t magnitude = magnitude_of(values[part][i]);
      const uint32_t finite = finite_magnitude_of(values[part][i]);
      largest = magnitude > largest ? magnitude : largest;
      largest_finite_one = finite > largest_finite_one ? finite : largest_finite_one;
    }
  }
  const bool is_special = agreed(largest) >= kInfBits;
  largest = agreed(largest_finite_one);
  if (block * kBlock >= numel) return;
  const Step step = Codes::step_for(largest);
  const DrawKey own = block_key(key, largest);
  Vector<uint32_t, 4> packed;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t random = draw_four(own, block, static_cast<uint32_t>(quad * 4 + i));
    packed.at[i] = 0;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const uint32_t code = is_special ? special_code_of<Codes>(values[part][i], step.inverse, random, part)
                                       : code_of<Codes>(values[part][i], step.inverse, random, part);
      packed.at[i] |= code << (part * 8);
    }
  }
  reinterpret_cast<Vector<uint32_t, 4>*>(words)[block * kThreadsOfBlock + quad] = packed;
  if (quad == 0) steps[block] = is_special ? -step.step : step.step;
}

template <class Codes, class T>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const uint32_t* words, const float* steps, T* to, int64_t numel, bool aligned) {
  const int64_t block = thread_index() / kThreadsOfBlock;
  if (block * kBlock >= numel) return;
  const int quad = static_cast<int>(threadIdx.x % kThreadsOfBlock);
  const auto packed = reinterpret_cast<const Vector<uint32_t, 4>*>(words)[block * kThreadsOfBlock + quad];
  const float step = steps[block], most = largest_finite(T{});
  const bool with_care = needs_care(step, most);
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    Vector<T, 4> values;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t code = packed.at[i] >> (part * 8) & 0xffu;
      values.at[i] = with_care ? narrowed_carefully(T{}, carefully_unpacked<Codes>(code, step, most))
                               : narrowed(T{}, unpacked<Codes>(code, step));
    }
    store(values, to, block * kBlock + part * kWords + quad * 4, numel, aligned);
  }
}

template <class Codes>
void pack_as(const Launch& job) {
  auto* codes = static_cast<uint8_t*>(job.to);
  with_float(job.dtype, [&]<class T>(T) {
    launch(job, kOfThread, "pack_blocks", pack_kernel<Codes, T>, static_cast<const T*>(job.from),
           reinterpret_cast<uint32_t*>(codes), reinterpret_cast<float*>(codes + code_bytes(job.numel)),
           job.numel, key_of(job.seed), is_aligned(job.from));
  });
}

template <class Codes>
void unpack_as(const Launch& job) {
  const auto* codes = static_cast<const uint8_t*>(job.from);
  with_float(job.dtype, [&]<class T>(T) {
    launch(job, kOfThread, "unpack_blocks", unpack_kernel<Codes, T>, reinterpret_cast<const uint32_t*>(codes),
           reinterpret_cast<const float*>(codes + code_bytes(job.numel)), static_cast<T*>(job.to), job.numel,
           is_aligned(job.to));
  });
}

}  // namespace

void pack_blocks(const Launch& job) { job.form == Form::kInt8 ? pack_as<Int8>(job) : pack_as<Fp8>(job); }
void unpack_blocks(const Launch& job) {
  job.form == Form::kInt8 ? unpack_as<Int8>(job) : unpack_as<Fp8>(job);
}

}  // namespace mlsys::packing::cuda
