// What a tensor must be to travel, and its bytes for the length of one operation.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "bindings/comm/where.h"

namespace mlsys::binding {

// Throws Refused for tensors on other devices and for layouts without one block of memory. `where` names rank
// and operation.
void check_tensor(const at::Tensor& tensor, const Where& where);
void check_tensors(const std::vector<at::Tensor>& tensors, const Where& where);
// Throws Refused unless `tensors` is one tensor, as c10d has called backends since it dropped several devices
// a process; returns it checked.
const at::Tensor& the_one(const std::vector<at::Tensor>& tensors, const Where& where);
// Throws Refused unless `others` are as many as `count`, of the dtype and number of elements of `like`.
void check_alike(const at::Tensor& like, const std::vector<at::Tensor>& others, size_t count,
                 const Where& where);

// Throws Refused unless `flat` holds exactly one `part` for each of `size` ranks.
void check_parts(const at::Tensor& part, const at::Tensor& flat, int size, const Where& where);

// The tensor itself when its memory is in logical order, else a copy (with the values, for inputs).
at::Tensor dense_input(const at::Tensor& tensor);
at::Tensor dense_output(const at::Tensor& tensor);
// Puts a result back where `dense_output` or `dense_input` had to copy.
void write_back(const at::Tensor& dense, const at::Tensor& tensor);

std::vector<at::Tensor> dense_inputs(const std::vector<at::Tensor>& tensors);
std::vector<at::Tensor> dense_outputs(const std::vector<at::Tensor>& tensors);
void write_back(const std::vector<at::Tensor>& dense, const std::vector<at::Tensor>& tensors);

std::vector<const void*> input_pointers(const std::vector<at::Tensor>& dense);
std::vector<void*> output_pointers(const std::vector<at::Tensor>& dense);

}  // namespace mlsys::binding
