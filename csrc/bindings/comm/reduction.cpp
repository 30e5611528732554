#include "bindings/comm/reduction.h"

#include <optional>
#include <sstream>

#include "bindings/comm/failures.h"

namespace mlsys::binding {
namespace {

using comm::ElementType;
using RedOp = c10d::ReduceOp::RedOpType;

std::optional<ElementType> element_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return ElementType::kFloat32;
    case at::kDouble:
      return ElementType::kFloat64;
    case at::kHalf:
      return ElementType::kFloat16;
    case at::kBFloat16:
      return ElementType::kBFloat16;
    case at::kChar:
      return ElementType::kInt8;
    case at::kByte:
      return ElementType::kUInt8;
    case at::kShort:
      return ElementType::kInt16;
    case at::kInt:
      return ElementType::kInt32;
    case at::kLong:
      return ElementType::kInt64;
    case at::kBool:
      return ElementType::kBool;
    default:
      return std::nullopt;
  }
}

const char* name_of(RedOp op) {
  constexpr const char* kNames[] = {"SUM",  "AVG", "PRODUCT", "MIN",       "MAX",
                                    "BAND", "BOR", "BXOR",    "PREMUL_SUM"};
  return op < std::size(kNames) ? kNames[op] : "an unknown operation";
}

double premul_factor(const c10d::ReduceOp& op) {
  const auto* supplement = dynamic_cast<const c10d::PreMulSumSupplement*>(op.supplement_.get());
  if (supplement == nullptr) return 1.0;
  return supplement->tensor_factor.defined() ? supplement->tensor_factor.item().toDouble()
                                             : supplement->double_factor;
}

}  // namespace

comm::Reduction reduction_for(const at::Tensor& tensor, const c10d::ReduceOp& op, const Where& where) {
  const bool complex = tensor.is_complex();
  const auto dtype = element_type(c10::toRealValueType(tensor.scalar_type()));
  const auto given = [&] {
    std::ostringstream text;
    text << where.words() << " was given " << name_of(op.op_) << " of " << tensor.scalar_type() << ".";
    return text.str();
  };
  if (!dtype) {
    throw Refused(
        given(),
        "Reductions take float32, float64, float16, bfloat16, int8, uint8, int16, int32, int64, bool and "
        "complex.",
        "Convert the tensor first.");
  }
  if (op.op_ > RedOp::PREMUL_SUM) {
    throw Refused(given(), "SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR and PREMUL_SUM are known.",
                  "Use one of them.");
  }
  const bool scaled = op.op_ == RedOp::AVG || op.op_ == RedOp::PREMUL_SUM;
  if (complex && !scaled && op.op_ != RedOp::SUM) {
    throw Refused(given(), "Complex numbers are summed or averaged: those work part by part.",
                  "Use SUM, AVG or PREMUL_SUM, or reduce torch.view_as_real of the tensor.");
  }
  const bool floating = complex || at::isFloatingType(tensor.scalar_type());
  const bool bitwise = op.op_ == RedOp::BAND || op.op_ == RedOp::BOR || op.op_ == RedOp::BXOR;
  if (bitwise && floating) {
    throw Refused(given(), "Bitwise operations need integers or bool.",
                  "Use MIN or MAX, or view the bits as int.");
  }
  if (scaled && !floating) {
    throw Refused(given(),
                  "AVG and PREMUL_SUM need a floating dtype, since integers would lose the fraction.",
                  "Use SUM and divide.");
  }
  static_assert(static_cast<int>(comm::ReduceOp::kSum) == RedOp::SUM);
  static_assert(static_cast<int>(comm::ReduceOp::kMax) == RedOp::MAX);
  static_assert(static_cast<int>(comm::ReduceOp::kPremulSum) == RedOp::PREMUL_SUM);
  comm::Reduction reduction{*dtype, static_cast<comm::ReduceOp>(op.op_)};
  if (op.op_ == RedOp::PREMUL_SUM) reduction.factor = premul_factor(op);
  return reduction;
}

size_t num_reduced(const at::Tensor& tensor) {
  return static_cast<size_t>(tensor.numel()) * (tensor.is_complex() ? 2 : 1);
}

}  // namespace mlsys::binding
