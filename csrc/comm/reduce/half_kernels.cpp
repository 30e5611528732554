#include "comm/reduce/loops.h"

namespace mlsys::comm {

Kernels half_kernels(ElementType dtype, ReduceOp op, SimdLevel level) {
  if (dtype == ElementType::kBFloat16) return loops::floating<BFloat16>(op, level);
  if (dtype == ElementType::kFloat16) return loops::floating<Float16>(op, level);
  return {};
}

}  // namespace mlsys::comm
