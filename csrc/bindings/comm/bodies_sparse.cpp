// All-reduce of sparse COO tensors: every rank gathers the others' entries and adds them up.
#include <ATen/ops/_sparse_coo_tensor_unsafe.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "bindings/comm/bodies.h"
#include "bindings/comm/tensors.h"

namespace mlsys::binding {
namespace {

using comm::Communicator;
using std::chrono::milliseconds;

// Gathers `part` (entries along `dim`, all ranks' padded to `longest`) and drops the padding.
at::Tensor gather_entries(Communicator& group, const at::Tensor& part, int64_t dim,
                          const std::vector<int64_t>& counts, milliseconds timeout) {
  // N entries of the longest rank, S sparse dims or value shape: rows are entries, so that padding is at the
  // end.
  const auto rows = part.movedim(dim, 0);
  auto shape = rows.sizes().vec();
  shape[0] = *std::max_element(counts.begin(), counts.end());
  auto padded = at::zeros(shape, rows.options());
  padded.narrow(0, 0, rows.size(0)).copy_(rows);
  std::vector<at::Tensor> gathered;
  for (size_t rank = 0; rank < counts.size(); ++rank) gathered.push_back(at::zeros(shape, rows.options()));
  group.all_gather(padded.const_data_ptr(), output_pointers(gathered), padded.numel() * padded.element_size(),
                   timeout);
  for (size_t rank = 0; rank < counts.size(); ++rank)
    gathered[rank] = gathered[rank].narrow(0, 0, counts[rank]);
  return at::cat(gathered, 0).movedim(0, dim).contiguous();
}

}  // namespace

Body all_reduce_sparse(at::Tensor tensor) {
  return [tensor = std::move(tensor)](Communicator& group, milliseconds timeout) {
    const auto mine = tensor.detach().coalesce();
    const int64_t count = mine._nnz();
    std::vector<int64_t> counts(group.size());
    std::vector<void*> slots(counts.size());
    for (size_t rank = 0; rank < counts.size(); ++rank) slots[rank] = &counts[rank];
    group.all_gather(&count, slots, sizeof(count), timeout);
    const auto indices = gather_entries(group, mine._indices(), 1, counts, timeout);
    const auto values = gather_entries(group, mine._values(), 0, counts, timeout);
    // Entries of one index lie in rank order on every rank, so all ranks add them in the same order.
    const auto sum =
        at::_sparse_coo_tensor_unsafe(indices, values, tensor.sizes(), tensor.options()).coalesce();
    at::Tensor target = tensor;  // not detached: a detached sparse tensor has indices and values of its own
    target.copy_(sum);
  };
}

}  // namespace mlsys::binding
