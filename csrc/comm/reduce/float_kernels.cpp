#include "comm/reduce/loops.h"

namespace mlsys::comm {

Kernels float_kernels(ElementType dtype, ReduceOp op, SimdLevel level) {
  if (dtype == ElementType::kFloat32) return loops::floating<float>(op, level);
  if (dtype == ElementType::kFloat64) return loops::floating<double>(op, level);
  return {};
}

}  // namespace mlsys::comm
