// What an operation is called, and the descriptor by which ranks check that they all mean the same one.
#pragma once

#include <cstdint>
#include <string>

#include "comm/communicator.h"

namespace mlsys::comm {

enum class OpKind : uint8_t {
  kNone,
  kAllReduce,
  kReduce,
  kAllGather,
  kReduceScatter,
  kBroadcast,
  kGather,
  kScatter,
  kAllToAll,
  kBarrier,
  kSend,
  kReceive,
  kAllReduceTree,
  kReduceScatterTree,
  kAllReduceBf16,
  kAllReduceInt8,
  kReduceShard,
  kFusedStep,
  kConnecting,  // Communicator::connect(): not one of the caller's, so it has number 0
  kLast = kConnecting,
};

// Published before every collective, in shared memory and on the wire; the layout is the wire format
// (little-endian, as all supported machines are). `count` is elements for reductions and bytes otherwise.
struct Descriptor {
  static constexpr uint32_t kMagic = 0x4f534c4d;  // "MLSO"
  static constexpr uint64_t kNoOffset = ~uint64_t{0};

  uint32_t magic = kMagic;
  OpKind kind = OpKind::kNone;
  ElementType dtype = ElementType::kUInt8;
  ReduceOp reduce_op = ReduceOp::kSum;
  uint8_t reserved = 0;
  int32_t rank = -1;  // global rank of the caller; not compared
  int32_t root = -1;  // group rank
  uint64_t sequence = 0;
  uint64_t count = 0;
  double factor = 1.0;
  // Where the caller's buffer lies in its arena, or kNoOffset; not compared.
  uint64_t arena_offset = kNoOffset;
};
static_assert(sizeof(Descriptor) == 48);

bool is_reduction(OpKind kind);

// True when both ranks called the same operation with the same sequence number, size, dtype, reduction and
// root.
bool same_operation(const Descriptor& left, const Descriptor& right);

// Defensive check of a descriptor that came over a wire: magic and every enumerator in range.
bool is_plausible(const Descriptor& descriptor);

const char* name_of(OpKind kind);
const char* name_of(ReduceOp op);

// "all_reduce number 7 (sum of 1000 float32)".
std::string describe(const Descriptor& descriptor);

// "rank 2 called ..., but rank 0 called ...".
std::string describe_mismatch(const Descriptor& mine, const Descriptor& other);

// For all_to_all and messages, whose sizes are not part of the descriptor.
std::string describe_size_mismatch(int sender, uint64_t sent, int receiver, uint64_t expected);

}  // namespace mlsys::comm
