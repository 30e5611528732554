#include "comm/reduce/loops.h"

namespace mlsys::comm {
namespace {

template <class T>
Kernels integral(ReduceOp op, SimdLevel level) {
  switch (op) {
    case ReduceOp::kSum:
      return loops::for_level<T, loops::Sum>(level);
    case ReduceOp::kProduct:
      return loops::for_level<T, loops::Product>(level);
    case ReduceOp::kMin:
      return loops::for_level<T, loops::Min>(level);
    case ReduceOp::kMax:
      return loops::for_level<T, loops::Max>(level);
    case ReduceOp::kBitAnd:
      return loops::for_level<T, loops::BitAnd>(level);
    case ReduceOp::kBitOr:
      return loops::for_level<T, loops::BitOr>(level);
    case ReduceOp::kBitXor:
      return loops::for_level<T, loops::BitXor>(level);
    default:
      return {};
  }
}

Kernels boolean(ReduceOp op, SimdLevel level) {
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kMax:
    case ReduceOp::kBitOr:
      return loops::for_level<loops::Bool, loops::BitOr>(level);
    case ReduceOp::kProduct:
    case ReduceOp::kMin:
    case ReduceOp::kBitAnd:
      return loops::for_level<loops::Bool, loops::BitAnd>(level);
    case ReduceOp::kBitXor:
      return loops::for_level<loops::Bool, loops::BitXor>(level);
    default:
      return {};
  }
}

}  // namespace

Kernels integer_kernels(ElementType dtype, ReduceOp op, SimdLevel level) {
  switch (dtype) {
    case ElementType::kInt8:
      return integral<int8_t>(op, level);
    case ElementType::kUInt8:
      return integral<uint8_t>(op, level);
    case ElementType::kInt16:
      return integral<int16_t>(op, level);
    case ElementType::kInt32:
      return integral<int32_t>(op, level);
    case ElementType::kInt64:
      return integral<int64_t>(op, level);
    case ElementType::kBool:
      return boolean(op, level);
    default:
      return {};
  }
}

}  // namespace mlsys::comm
