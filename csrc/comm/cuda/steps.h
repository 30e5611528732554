// The steps of an all-reduce between the GPUs of one host, for one thread of one block. Plain code for host
// and device: the kernels run it on memory that peers have mapped, the CPU tests run it on arrays.
//
// Data moves in packs of 16 bytes; the last one may be partly filled. A pack is handled by the same block and
// thread in every step and on every rank, so blocks of different ranks need to wait only for those of their
// own number.
//
// one-shot   stage: copy the own data where peers see it. Wait. reduce: read every rank's, write the result.
//            Each rank reads (p-1)n bytes of its peers: least latency, for small messages.
// two-shot   rank q owns slice q. stage: copy what the others own. Wait. reduce: read the own slice from all
//            ranks, publish the result. Wait. gather: copy the other slices' results. 2n(p-1)/p bytes.
//
// Values are combined as a balanced binary tree in rank order, left operand first, as csrc/comm/reduce does:
// the same bits on all ranks, and the CPU's. fp16 and bf16 accumulate in fp32 and are rounded once; an
// average divides before that. Inf and nan go where fp32 takes them. Test: tests/native/test_cuda_steps.cpp
// (arithmetic), tests/comm/test_cuda_all_reduce.py (on a GPU).
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/half.h"

namespace mlsys::comm::cuda {

constexpr int kMostRanks = 8;
constexpr int kPackBytes = 16;

template <class T>
struct alignas(kPackBytes) Pack {
  static constexpr int kLanes = kPackBytes / sizeof(T);
  T lanes[kLanes];
};

MLSYS_HD float rounded(float value, float) { return value; }
MLSYS_HD Float16 rounded(float value, Float16) { return to_float16(value); }
MLSYS_HD BFloat16 rounded(float value, BFloat16) { return to_bfloat16(value); }

// ((v0 v1)(v2 v3))(v4 v5) ... into values[0]. The loops unroll into registers.
MLSYS_HD float tree_sum(float (&values)[kMostRanks], int size) {
#pragma unroll
  for (int width = 1; width < kMostRanks; width *= 2) {
#pragma unroll
    for (int i = 0; i + width < kMostRanks; i += 2 * width) {
      if (i + width < size) values[i] = values[i] + values[i + width];
    }
  }
  return values[0];
}

template <class T>
MLSYS_HD Pack<T> reduced(const Pack<T> (&sources)[kMostRanks], int size, bool average) {
  Pack<T> result;
#pragma unroll
  for (int lane = 0; lane < Pack<T>::kLanes; ++lane) {
    float values[kMostRanks];
#pragma unroll
    for (int rank = 0; rank < kMostRanks; ++rank) {
      values[rank] = rank < size ? to_float(sources[rank].lanes[lane]) : 0.0f;
    }
    const float sum = tree_sum(values, size);
    result.lanes[lane] = rounded(average ? sum / static_cast<float>(size) : sum, T{});
  }
  return result;
}

// A tensor of `count` elements, read and written in packs; `aligned` to 16 bytes or not.
template <class T>
struct Elements {
  T* data;
  int64_t count;
  bool aligned;

  MLSYS_HD int64_t num_packs() const { return (count + Pack<T>::kLanes - 1) / Pack<T>::kLanes; }
  MLSYS_HD bool whole(int64_t pack) const { return aligned && (pack + 1) * Pack<T>::kLanes <= count; }
  MLSYS_HD Pack<T> read(int64_t pack) const {
    if (whole(pack)) return reinterpret_cast<const Pack<T>*>(data)[pack];
    Pack<T> result{};
    const int64_t first = pack * Pack<T>::kLanes;
#pragma unroll
    for (int lane = 0; lane < Pack<T>::kLanes; ++lane) {
      if (first + lane < count) result.lanes[lane] = data[first + lane];
    }
    return result;
  }
  MLSYS_HD void write(int64_t pack, const Pack<T>& value) const {
    if (whole(pack)) {
      reinterpret_cast<Pack<T>*>(data)[pack] = value;
      return;
    }
    const int64_t first = pack * Pack<T>::kLanes;
#pragma unroll
    for (int lane = 0; lane < Pack<T>::kLanes; ++lane) {
      if (first + lane < count) data[first + lane] = value.lanes[lane];
    }
  }
};

// Which packs a thread handles: first, first + stride, ...
struct Lane {
  int64_t first;
  int64_t stride;
};

// What a rank shares with its peers in one call; arrays by rank. Both areas hold whole packs.
struct Shared {
  std::byte* staged[kMostRanks];   // num_packs packs
  std::byte* results[kMostRanks];  // slice_packs packs
  int rank;
  int size;
};

MLSYS_HD int64_t slice_packs(int64_t num_packs, int size) { return (num_packs + size - 1) / size; }
// How many packs slice `owner` has: the last ones may be short, or empty.
MLSYS_HD int64_t packs_in_slice(int64_t num_packs, int size, int owner) {
  const int64_t each = slice_packs(num_packs, size);
  const int64_t left = num_packs - each * owner;
  return left < 0 ? 0 : (left < each ? left : each);
}

template <class T>
MLSYS_HD Pack<T>* packs(std::byte* area) {
  return reinterpret_cast<Pack<T>*>(area);
}

// Every rank's pack, this rank's own from its tensor.
template <class T>
MLSYS_HD Pack<T> reduce_pack(const Elements<T>& tensor, const Shared& shared, int64_t pack, bool average) {
  Pack<T> sources[kMostRanks];
#pragma unroll
  for (int rank = 0; rank < kMostRanks; ++rank) {
    if (rank >= shared.size) continue;
    sources[rank] = rank == shared.rank ? tensor.read(pack) : packs<T>(shared.staged[rank])[pack];
  }
  return reduced(sources, shared.size, average);
}

template <class T>
MLSYS_HD void one_shot_stage(const Elements<T>& tensor, const Shared& shared, Lane lane) {
  for (int64_t pack = lane.first; pack < tensor.num_packs(); pack += lane.stride) {
    packs<T>(shared.staged[shared.rank])[pack] = tensor.read(pack);
  }
}

template <class T>
MLSYS_HD void one_shot_reduce(const Elements<T>& tensor, const Shared& shared, Lane lane, bool average) {
  for (int64_t pack = lane.first; pack < tensor.num_packs(); pack += lane.stride) {
    tensor.write(pack, reduce_pack(tensor, shared, pack, average));
  }
}

template <class T>
MLSYS_HD void two_shot_stage(const Elements<T>& tensor, const Shared& shared, Lane lane) {
  const int64_t each = slice_packs(tensor.num_packs(), shared.size);
  for (int owner = 0; owner < shared.size; ++owner) {
    if (owner == shared.rank) continue;
    const int64_t num = packs_in_slice(tensor.num_packs(), shared.size, owner);
    for (int64_t i = lane.first; i < num; i += lane.stride) {
      packs<T>(shared.staged[shared.rank])[each * owner + i] = tensor.read(each * owner + i);
    }
  }
}

template <class T>
MLSYS_HD void two_shot_reduce(const Elements<T>& tensor, const Shared& shared, Lane lane, bool average) {
  const int64_t each = slice_packs(tensor.num_packs(), shared.size);
  const int64_t num = packs_in_slice(tensor.num_packs(), shared.size, shared.rank);
  for (int64_t i = lane.first; i < num; i += lane.stride) {
    const Pack<T> result = reduce_pack(tensor, shared, each * shared.rank + i, average);
    packs<T>(shared.results[shared.rank])[i] = result;
    tensor.write(each * shared.rank + i, result);
  }
}

template <class T>
MLSYS_HD void two_shot_gather(const Elements<T>& tensor, const Shared& shared, Lane lane) {
  const int64_t each = slice_packs(tensor.num_packs(), shared.size);
  for (int owner = 0; owner < shared.size; ++owner) {
    if (owner == shared.rank) continue;
    const int64_t num = packs_in_slice(tensor.num_packs(), shared.size, owner);
    for (int64_t i = lane.first; i < num; i += lane.stride) {
      tensor.write(each * owner + i, packs<T>(shared.results[owner])[i]);
    }
  }
}

}  // namespace mlsys::comm::cuda
