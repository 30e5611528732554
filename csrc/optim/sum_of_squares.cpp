// Sum of squares in double over many arrays of float32, bfloat16 or float16: the norm pass before a clipped
// step, and the inf/nan test.
//
// Order, which alone decides the bits: each array is cut into chunks of kChunkElements from its own start;
// inside a chunk, lane j of kLanes adds the squares of elements j, j + kLanes, ... in turn; lanes are added
// in a binary tree; chunk sums are added one after another, array by array. So the result depends on neither
// threads nor instruction set, nor on whether the arrays lie in one arena. The square of a float is exact in
// double and cannot overflow there; inf gives inf, nan gives nan. Reference: reference.py; test:
// tests/optim/test_sum_of_squares.py.
#include <algorithm>
#include <cstddef>
#include <vector>

#include "core/parallel.h"
#include "core/simd_dispatch.h"
#include "optim/launch.h"

namespace mlsys {
namespace {

constexpr int kLanes = 32;

struct ChunkSum {
  template <class T>
  MLSYS_INLINE void operator()(const T* __restrict data, int64_t count, double* result) const {
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) {
        const double value = to_float(data[i + j]);
        lanes[j] += value * value;
      }
    }
    for (int j = 0; i < count; ++i, ++j) {
      const double value = to_float(data[i]);
      lanes[j] += value * value;
    }
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    }
    *result = lanes[0];
  }
};

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
      run_simd(level, ChunkSum{}, reinterpret_cast<const T*>(chunk.data), chunk.count, &terms[i]);
    }
  });
}

int64_t bytes_of(Stored form) { return form == Stored::kFloat32 ? 4 : 2; }

}  // namespace

double chunk_sum_of_squares(const float* chunk, int64_t numel) {
  double sum = 0.0;
  run_simd(simd_level(), ChunkSum{}, chunk, numel, &sum);
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
