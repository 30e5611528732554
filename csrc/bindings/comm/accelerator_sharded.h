// The sharded updates of an accelerator's tensors, by the collectives of the backend inside the group.
#pragma once

#include <cstddef>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <vector>

#include "bindings/comm/where.h"

namespace mlsys::binding {

// The parts of a partition's rows: for each row a view of `data` for each rank. Throws Refused for offsets
// that descend, leave the data, or are no whole number of rows.
std::vector<std::vector<at::Tensor>> rows_of(const at::Tensor& data, const std::vector<size_t>& partition,
                                             int size, const Where& where);

// Both work in place and at once for all rows; equal parts without a copy. Unequal ones go through the list
// forms, which NCCL takes of any lengths.
c10::intrusive_ptr<c10d::Work> reduce_rows(c10d::Backend& backend, const at::Tensor& data,
                                           std::vector<std::vector<at::Tensor>> rows);
c10::intrusive_ptr<c10d::Work> share_rows(c10d::Backend& backend, const at::Tensor& data,
                                          std::vector<std::vector<at::Tensor>> rows);

}  // namespace mlsys::binding
