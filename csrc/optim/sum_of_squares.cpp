// Sum of squares in double over many arrays of float32, bfloat16 or float16: the norm pass before a clipped
// step, and the inf/nan test.
//
// Order, which alone decides the bits: each array is cut into chunks of kChunkElements from its own start;
// inside a chunk, lane j of the lanes adds the squares of elements j, j + lanes, ... in turn; lanes are added
// in a binary tree; chunk sums are added one after another, array by array. So the result depends on neither
// threads nor instruction set, nor on whether the arrays lie in one arena. Inf gives inf, nan gives nan.
// Reference: reference.py; test: tests/optim/test_sum_of_squares.py.
//
// float32: 32 lanes in double, where the square of a float is exact and cannot overflow.
//
// bfloat16, float16: 64 lanes, where the tree begins with neighbours. Their squares are exact in float32, 16
// and 22 bits of 24, so a lane adds kRun of them in float32 and then the run's sum in double: four times as
// fast as converting each to double. Of the kRun additions the first is exact and each other one rounds by at
// most 2^-24, relative to what it gives, and all terms are positive: a run's sum is off by at most 31 * 2^-24
// of itself. A chunk whose sum is not finite, or below 2^-90, is summed again in double as float32 is, so
// that what overflows or underflows as a square counts, and an inf is one of the gradients. Above that,
// squares that a processor flushes to zero are fewer than 4096 times 2^-126, which is 2^-24 of the sum. So
// the sum of squares of narrow gradients is within 2^-19 of itself, and their norm within 2^-20.
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

#include "core/parallel.h"
#include "core/simd_dispatch.h"
#include "optim/launch.h"

namespace mlsys {
namespace {

template <int kLanes>
MLSYS_INLINE double add_lanes(double* lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

struct WideChunkSum {
  static constexpr int kLanes = 32;

  template <class T>
  MLSYS_INLINE void operator()(const T* __restrict data, int64_t count, double* result) const {
    double lanes[kLanes] = {};
    const int64_t rest = count % kLanes, whole = count - rest;
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) {
        const double value = to_float(data[i + j]);
        lanes[j] += value * value;
      }
    }
    for (int64_t j = 0; j < rest; ++j) {
      const double value = to_float(data[whole + j]);
      lanes[j] += value * value;
    }
    *result = add_lanes<kLanes>(lanes);
  }
};

// Magnitudes of the two elements that share a 32-bit word, without moving either to another lane. A float16
// that is not finite is inf: which of the two it was, the sum in double tells.
static_assert(std::endian::native == std::endian::little);
MLSYS_INLINE float first_of(BFloat16, uint32_t word) { return float_from_bits(word << 16); }
MLSYS_INLINE float second_of(BFloat16, uint32_t word) { return float_from_bits(word & 0xffff0000u); }
MLSYS_INLINE float from_float16_magnitude(uint32_t shifted) {  // its 15 bits, shifted by 13
  return shifted < 0x7c00u << 13 ? float_from_bits(shifted) * 0x1p112f
                                 : std::numeric_limits<float>::infinity();
}
MLSYS_INLINE float first_of(Float16, uint32_t word) {
  return from_float16_magnitude(word << 13 & 0x0fffe000u);
}
MLSYS_INLINE float second_of(Float16, uint32_t word) {
  return from_float16_magnitude(word >> 3 & 0x0fffe000u);
}

struct NarrowChunkSum {
  static constexpr int kLanes = 64, kWords = kLanes / 2;
  static constexpr int64_t kRun = 32;

  template <class T>
  MLSYS_INLINE void operator()(const T* __restrict data, int64_t count, double* result) const {
    double lanes[kLanes] = {};  // the first element of each word, then the second
    for (int64_t begin = 0; begin < count; begin += kRun * kLanes) {
      add_run(data + begin, std::min(count - begin, kRun * kLanes), lanes);
    }
    const double sum = add_lanes<kLanes>(lanes);
    const bool is_exact_enough = sum >= 0x1p-90 && sum <= std::numeric_limits<double>::max();
    if (is_exact_enough) {
      *result = sum;
    } else {
      WideChunkSum{}(data, count, result);
    }
  }

 private:
  template <class T>
  static MLSYS_INLINE void add_run(const T* __restrict data, int64_t count, double* __restrict lanes) {
    float first[kWords] = {}, second[kWords] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) add_row(data + i, first, second);
    if (i < count) {
      T row[kLanes] = {};
      std::memcpy(row, data + i, static_cast<size_t>(count - i) * sizeof(T));
      add_row(row, first, second);
    }
    for (int j = 0; j < kWords; ++j) {
      lanes[j] += first[j];
      lanes[kWords + j] += second[j];
    }
  }

  template <class T>
  static MLSYS_INLINE void add_row(const T* __restrict row, float* __restrict first,
                                   float* __restrict second) {
    for (int j = 0; j < kWords; ++j) {
      uint32_t word;
      std::memcpy(&word, row + 2 * j, sizeof(word));
      const float left = first_of(T{}, word), right = second_of(T{}, word);
      first[j] += left * left;
      second[j] += right * right;
    }
  }
};

template <class T>
struct ChunkSum : NarrowChunkSum {};
template <>
struct ChunkSum<float> : WideChunkSum {};

struct Chunk {
  const std::byte* data;
  int64_t count;
};

template <class T>
void sum_chunks(const std::vector<Chunk>& chunks, double* terms, ParallelFor pool) {
  const SimdLevel level = simd_level();
  parallel_for(pool, static_cast<int64_t>(chunks.size()), 8, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Chunk& chunk = chunks[static_cast<size_t>(i)];
      run_simd(level, ChunkSum<T>{}, reinterpret_cast<const T*>(chunk.data), chunk.count, &terms[i]);
    }
  });
}

int64_t bytes_of(Stored form) { return form == Stored::kFloat32 ? 4 : 2; }

}  // namespace

double chunk_sum_of_squares(const float* chunk, int64_t numel) {
  double sum = 0.0;
  run_simd(simd_level(), ChunkSum<float>{}, chunk, numel, &sum);
  return sum;
}

int64_t num_terms(const Span* spans, int64_t num_spans) {
  int64_t total = 0;
  for (int64_t i = 0; i < num_spans; ++i) total += num_chunks(spans[i].numel);
  return total;
}

void chunk_squares(const Span* spans, int64_t num_spans, Stored form, double* terms, ParallelFor pool) {
  std::vector<Chunk> chunks;
  chunks.reserve(static_cast<size_t>(num_spans));
  for (int64_t i = 0; i < num_spans; ++i) {
    for (int64_t begin = 0; begin < spans[i].numel; begin += kChunkElements) {
      chunks.push_back({static_cast<const std::byte*>(spans[i].data) + begin * bytes_of(form),
                        std::min(kChunkElements, spans[i].numel - begin)});
    }
  }
  switch (form) {
    case Stored::kBFloat16:
      return sum_chunks<BFloat16>(chunks, terms, pool);
    case Stored::kFloat16:
      return sum_chunks<Float16>(chunks, terms, pool);
    default:
      return sum_chunks<float>(chunks, terms, pool);
  }
}

double add_terms(const double* terms, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += terms[i];
  return sum;
}

double sum_of_squares(const Span* spans, int64_t num_spans, Stored form, ParallelFor pool) {
  std::vector<double> terms(static_cast<size_t>(num_terms(spans, num_spans)));
  chunk_squares(spans, num_spans, form, terms.data(), pool);
  return add_terms(terms.data(), static_cast<int64_t>(terms.size()));
}

}  // namespace mlsys
