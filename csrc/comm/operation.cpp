#include "comm/operation.h"

#include "core/dtype.h"

namespace mlsys::comm {

bool is_reduction(OpKind kind) {
  switch (kind) {
    case OpKind::kAllReduce:
    case OpKind::kReduce:
    case OpKind::kReduceScatter:
    case OpKind::kAllReduceTree:
    case OpKind::kReduceScatterTree:
    case OpKind::kAllReduceBf16:
    case OpKind::kAllReduceInt8:
    case OpKind::kReduceShard:
    case OpKind::kFusedStep:
      return true;
    default:
      return false;
  }
}

bool same_operation(const Descriptor& left, const Descriptor& right) {
  if (left.sequence != right.sequence || left.kind != right.kind || left.count != right.count ||
      left.root != right.root) {
    return false;
  }
  return !is_reduction(left.kind) ||
         (left.dtype == right.dtype && left.reduce_op == right.reduce_op && left.factor == right.factor);
}

bool is_plausible(const Descriptor& descriptor) {
  return descriptor.magic == Descriptor::kMagic && descriptor.kind > OpKind::kNone &&
         descriptor.kind <= OpKind::kLast && descriptor.dtype <= ElementType::kBool &&
         descriptor.reduce_op <= ReduceOp::kPremulSum;
}

const char* name_of(OpKind kind) {
  constexpr const char* kNames[] = {"no operation",
                                    "all_reduce",
                                    "reduce",
                                    "all_gather",
                                    "reduce_scatter",
                                    "broadcast",
                                    "gather",
                                    "scatter",
                                    "all_to_all",
                                    "barrier",
                                    "send",
                                    "recv",
                                    "all_reduce_tree",
                                    "reduce_scatter_tree",
                                    "all_reduce_compressed to bf16",
                                    "all_reduce_compressed to int8",
                                    "reduce_shard",
                                    "reduce_scatter_optimize_all_gather",
                                    "connecting"};
  const auto index = static_cast<size_t>(kind);
  return index < sizeof(kNames) / sizeof(kNames[0]) ? kNames[index] : "unknown operation";
}

const char* name_of(ReduceOp op) {
  constexpr const char* kNames[] = {"sum",     "avg",    "product", "min",       "max",
                                    "bit-and", "bit-or", "bit-xor", "premul-sum"};
  const auto index = static_cast<size_t>(op);
  return index < sizeof(kNames) / sizeof(kNames[0]) ? kNames[index] : "unknown reduction";
}

std::string describe(const Descriptor& descriptor) {
  std::string text = name_of(descriptor.kind);
  if (descriptor.kind == OpKind::kNone || descriptor.kind == OpKind::kConnecting) return text;
  text += " number " + std::to_string(descriptor.sequence);
  if (is_reduction(descriptor.kind)) {
    text += std::string(" (") + name_of(descriptor.reduce_op) + " of " + std::to_string(descriptor.count) +
            " " + mlsys::name_of(static_cast<DType>(descriptor.dtype));
    if (descriptor.reduce_op == ReduceOp::kPremulSum) text += ", factor " + std::to_string(descriptor.factor);
  } else if (descriptor.kind != OpKind::kBarrier && descriptor.kind != OpKind::kAllToAll) {
    text += " (" + std::to_string(descriptor.count) + " bytes";
  } else {
    return text;
  }
  if (descriptor.root >= 0) text += ", root " + std::to_string(descriptor.root);
  return text + ")";
}

std::string describe_mismatch(const Descriptor& mine, const Descriptor& other) {
  return "ranks disagree about the operation: rank " + std::to_string(mine.rank) + " called " +
         describe(mine) + ", but rank " + std::to_string(other.rank) + " called " + describe(other) +
         ". All ranks of a group must make the same collective calls in the same order.";
}

std::string describe_size_mismatch(int sender, uint64_t sent, int receiver, uint64_t expected) {
  return "ranks disagree about a size: rank " + std::to_string(sender) + " sent " + std::to_string(sent) +
         " bytes to rank " + std::to_string(receiver) + ", which expected " + std::to_string(expected) +
         ". Give both the same size.";
}

}  // namespace mlsys::comm
