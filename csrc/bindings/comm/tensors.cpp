#include "bindings/comm/tensors.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <sstream>

#include "bindings/comm/failures.h"

namespace mlsys::binding {
namespace {

bool in_logical_order(const at::Tensor& tensor) {
  return tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
}

}  // namespace

void check_tensor(const at::Tensor& tensor, const Where& where) {
  if (!tensor.defined()) {
    throw Refused(where + " was given an undefined tensor.", "A tensor is needed.", "Allocate it first.");
  }
  if (!tensor.device().is_cpu()) {
    throw Refused(
        where + " was given a tensor on " + tensor.device().str() + ".",
        "CPU tensors are expected; torch's own collectives take CUDA tensors too, where torch has NCCL "
        "and sees a GPU.",
        "Move the tensor with .cpu() first.");
  }
  if (tensor.layout() != at::kStrided) {
    std::ostringstream given;
    given << where.words() << " was given a tensor of layout " << tensor.layout() << ".";
    throw Refused(given.str(),
                  "Only all_reduce takes sparse tensors (COO, op SUM); the rest need strided ones.",
                  "Call .to_dense() first.");
  }
}

void check_tensors(const std::vector<at::Tensor>& tensors, const Where& where) {
  for (const auto& tensor : tensors) check_tensor(tensor, where);
}

const at::Tensor& the_one(const std::vector<at::Tensor>& tensors, const Where& where) {
  if (tensors.size() != 1) {
    throw Refused(where + " was given " + std::to_string(tensors.size()) + " tensors.",
                  "One tensor a process is expected.",
                  "Call it once for each tensor, or use the coalesced form.");
  }
  check_tensor(tensors[0], where);
  return tensors[0];
}

void check_alike(const at::Tensor& like, const std::vector<at::Tensor>& others, size_t count,
                 const Where& where) {
  if (others.size() != count) {
    throw Refused(where + " was given a list of " + std::to_string(others.size()) + " tensors.",
                  "The list needs one tensor for each of the " + std::to_string(count) + " ranks.",
                  "Build it with [torch.empty_like(t) for _ in range(world_size)].");
  }
  for (const auto& other : others) {
    check_tensor(other, where);
    if (other.scalar_type() == like.scalar_type() && other.numel() == like.numel()) continue;
    std::ostringstream given;
    given << where.words() << " was given tensors of " << like.scalar_type() << like.sizes() << " and "
          << other.scalar_type() << other.sizes() << ".";
    throw Refused(given.str(), "All tensors of one call need the same dtype and number of elements.",
                  "Pad them to one size, or use all_to_all, whose sizes may differ.");
  }
}

void check_parts(const at::Tensor& part, const at::Tensor& flat, int size, const Where& where) {
  check_tensor(part, where);
  check_tensor(flat, where);
  if (flat.scalar_type() == part.scalar_type() && flat.numel() == part.numel() * size) return;
  throw Refused(
      where + " was given buffers of " + std::to_string(part.numel()) + " and " +
          std::to_string(flat.numel()) + " elements.",
      "The larger one needs the dtype of the smaller one and exactly its number of elements for each of " +
          std::to_string(size) + " ranks.",
      "Pad the smaller one, or use the list form.");
}

at::Tensor dense_input(const at::Tensor& tensor) {
  if (in_logical_order(tensor)) return tensor;
  return dense_output(tensor).copy_(tensor.detach());
}

at::Tensor dense_output(const at::Tensor& tensor) {
  return in_logical_order(tensor) ? tensor : at::empty(tensor.sizes(), tensor.options());
}

void write_back(const at::Tensor& dense, const at::Tensor& tensor) {
  if (!dense.is_same(tensor)) tensor.detach().copy_(dense);
}

std::vector<at::Tensor> dense_inputs(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> dense(tensors.size());
  std::transform(tensors.begin(), tensors.end(), dense.begin(), dense_input);
  return dense;
}

std::vector<at::Tensor> dense_outputs(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> dense(tensors.size());
  std::transform(tensors.begin(), tensors.end(), dense.begin(), dense_output);
  return dense;
}

void write_back(const std::vector<at::Tensor>& dense, const std::vector<at::Tensor>& tensors) {
  for (size_t i = 0; i < dense.size(); ++i) write_back(dense[i], tensors[i]);
}

std::vector<const void*> input_pointers(const std::vector<at::Tensor>& dense) {
  std::vector<const void*> pointers;
  for (const auto& tensor : dense) pointers.push_back(tensor.const_data_ptr());
  return pointers;
}

std::vector<void*> output_pointers(const std::vector<at::Tensor>& dense) {
  std::vector<void*> pointers;
  for (const auto& tensor : dense) pointers.push_back(tensor.mutable_data_ptr());
  return pointers;
}

}  // namespace mlsys::binding
