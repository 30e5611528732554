#include "comm/reduce/reducer.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>

#include "comm/operation.h"
#include "core/dtype.h"

namespace mlsys::comm {
namespace {

// Elements of each source at a time. Longer runs are slower: all sources' runs and the partials have to stay
// in the first-level cache until the result is written, also where buffers lie at the same offset in a page.
constexpr size_t kBlock = 128;
constexpr size_t kMostLevels = 20;

bool is_floating(ElementType dtype) {
  return dtype == ElementType::kFloat32 || dtype == ElementType::kFloat64 || dtype == ElementType::kFloat16 ||
         dtype == ElementType::kBFloat16;
}

const std::byte* advanced(const void* pointer, size_t bytes) {
  return static_cast<const std::byte*>(pointer) + bytes;
}
std::byte* advanced(void* pointer, size_t bytes) { return static_cast<std::byte*>(pointer) + bytes; }

// The partial blocks of one walk up the tree, level 0 at the leaves.
struct Levels {
  alignas(64) std::byte blocks[kMostLevels][kBlock * sizeof(double)];
};

// Combines units (pairs of sources; a last single one when their number is odd) as a binary counter does:
// level k holds the combination of 2^k neighbouring units, and a new unit carries upwards past the levels
// that are full. What remains at the end is folded from the small, right-most levels into the large ones.
// unit(i, target) writes unit i; the result is the returned block.
template <class Unit>
std::byte* walk_tree(const Kernels& kernels, Levels& levels, size_t num_units, size_t count, Unit unit) {
  for (size_t i = 0; i < num_units; ++i) {
    const int carry = std::countr_one(i);  // levels 0 .. carry - 1 are full
    std::byte* target = levels.blocks[carry];
    unit(i, target);
    for (int level = 0; level < carry; ++level) kernels.merge(levels.blocks[level], target, target, count);
  }
  int level = std::countr_zero(num_units);
  std::byte* result = levels.blocks[level];
  for (++level; (num_units >> level) != 0; ++level) {
    if ((num_units >> level & 1) != 0) kernels.merge(levels.blocks[level], result, result, count);
  }
  return result;
}

// One block of the raw sources -> its partial, in `levels`.
std::byte* block_partial(const Kernels& kernels, const double* factor, Levels& levels,
                         std::span<const void* const> sources, size_t offset_bytes, size_t count) {
  const auto unit = [&](size_t i, std::byte* target) {
    const void* left = advanced(sources[2 * i], offset_bytes);
    const bool single = 2 * i + 1 == sources.size();
    if (factor == nullptr) {
      if (single) return kernels.load(left, target, count);
      return kernels.load_pair(left, advanced(sources[2 * i + 1], offset_bytes), target, count);
    }
    kernels.load_scaled(left, target, count, *factor);
    if (single) return;
    std::byte* right = levels.blocks[kMostLevels - 1];
    kernels.load_scaled(advanced(sources[2 * i + 1], offset_bytes), right, count, *factor);
    kernels.merge(target, right, target, count);
  };
  return walk_tree(kernels, levels, (sources.size() + 1) / 2, count, unit);
}

}  // namespace

Kernels kernels_for(ElementType dtype, ReduceOp op, SimdLevel level) {
  for (const auto family : {float_kernels, half_kernels, integer_kernels}) {
    const Kernels kernels = family(dtype, op, level);
    if (kernels.merge != nullptr) return kernels;
  }
  const std::string type = mlsys::name_of(static_cast<DType>(dtype));
  throw std::invalid_argument(
      std::string("a reduction by ") + name_of(op) + " of " + type + " was asked for; " +
      (is_floating(dtype)
           ? "floating-point types have sum, avg, premul-sum, product, min and max. Reinterpret the "
             "tensor as integers for bit operations."
           : "integer types have sum, product, min, max and the bit operations. Convert to a "
             "floating-point type, or sum and divide afterwards."));
}

Reducer::Reducer(const Reduction& reduction, int group_size)
    : kernels_(kernels_for(reduction.dtype, reduction.op, simd_level())),
      op_(reduction.op),
      factor_(reduction.factor),
      group_size_(group_size),
      is_bool_(reduction.dtype == ElementType::kBool),
      element_bytes_(size_of(static_cast<DType>(reduction.dtype))) {}

bool Reducer::partial_is_element() const {
  return kernels_.partial_bytes == element_bytes_ && op_ != ReduceOp::kPremulSum && !is_bool_;
}

void Reducer::reduce(std::span<const void* const> sources, std::span<void* const> destinations,
                     size_t count) const {
  if (destinations.empty()) return;
  Levels levels;
  const double* factor = op_ == ReduceOp::kPremulSum ? &factor_ : nullptr;
  const bool in_one_pass = sources.size() == 2 && factor == nullptr && !divides();
  for (size_t first = 0; first < count; first += kBlock) {
    const size_t n = std::min(kBlock, count - first);
    const size_t offset = first * element_bytes_;
    if (in_one_pass) {
      void* result = advanced(destinations[0], offset);
      kernels_.reduce_pair(advanced(sources[0], offset), advanced(sources[1], offset), result, n);
      for (void* other : destinations.subspan(1))
        std::memcpy(advanced(other, offset), result, n * element_bytes_);
      continue;
    }
    const std::byte* partial = block_partial(kernels_, factor, levels, sources, offset, n);
    for (void* destination : destinations) finish(partial, advanced(destination, offset), n);
  }
}

void Reducer::reduce_to_partial(std::span<const void* const> sources, void* partial, size_t count) const {
  Levels levels;
  const double* factor = op_ == ReduceOp::kPremulSum ? &factor_ : nullptr;
  for (size_t first = 0; first < count; first += kBlock) {
    const size_t n = std::min(kBlock, count - first);
    const std::byte* block = block_partial(kernels_, factor, levels, sources, first * element_bytes_, n);
    std::memcpy(advanced(partial, first * kernels_.partial_bytes), block, n * kernels_.partial_bytes);
  }
}

void Reducer::combine_partials(std::span<const void* const> partials, void* destination, size_t count) const {
  Levels levels;
  for (size_t first = 0; first < count; first += kBlock) {
    const size_t n = std::min(kBlock, count - first);
    const size_t offset = first * kernels_.partial_bytes;
    const auto unit = [&](size_t i, std::byte* target) {
      const void* left = advanced(partials[2 * i], offset);
      if (2 * i + 1 == partials.size()) {
        std::memcpy(target, left, n * kernels_.partial_bytes);
      } else {
        kernels_.merge(left, advanced(partials[2 * i + 1], offset), target, n);
      }
    };
    const std::byte* block = walk_tree(kernels_, levels, (partials.size() + 1) / 2, n, unit);
    finish(block, advanced(destination, first * element_bytes_), n);
  }
}

void Reducer::finish(const void* partial, void* destination, size_t count) const {
  if (divides()) {
    kernels_.finish_divided(partial, destination, count, group_size_);
  } else {
    kernels_.finish(partial, destination, count);
  }
}

}  // namespace mlsys::comm
