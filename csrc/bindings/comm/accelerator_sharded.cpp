#include "bindings/comm/accelerator_sharded.h"

#include <algorithm>
#include <string>
#include <utility>

#include "bindings/comm/failures.h"
#include "bindings/comm/work.h"

namespace mlsys::binding {

namespace {

using WorkPtr = c10::intrusive_ptr<c10d::Work>;
using Row = std::vector<at::Tensor>;

bool is_even(const Row& row) {
  return std::all_of(row.begin(), row.end(),
                     [&](const auto& part) { return part.numel() == row[0].numel(); });
}

// The parts of a row, which follow one another, as one tensor.
at::Tensor whole(const at::Tensor& data, const Row& row) {
  const int64_t begin = row.front().storage_offset() - data.storage_offset();
  const int64_t end = row.back().storage_offset() + row.back().numel() - data.storage_offset();
  return data.slice(0, begin, end);
}

template <class Start>
WorkPtr for_each_row(c10d::Backend& backend, const at::Tensor& data, std::vector<Row> rows, Start&& start) {
  std::vector<WorkPtr> works;
  for (auto& row : rows) {
    auto all = whole(data, row);
    if (all.numel() > 0) works.push_back(start(row[backend.getRank()], all, row));
  }
  if (works.size() == 1) return works[0];
  return c10::make_intrusive<JoinedWork>(backend.getRank(), std::move(works));
}

}  // namespace

std::vector<Row> rows_of(const at::Tensor& data, const std::vector<size_t>& partition, int size,
                         const Where& where) {
  const size_t stride = static_cast<size_t>(size) + 1;
  bool fits = partition.size() % stride == 0;
  std::vector<Row> rows;
  for (size_t first = 0; fits && first < partition.size(); first += stride) {
    const auto begin = partition.begin() + static_cast<std::ptrdiff_t>(first);
    const auto end = begin + static_cast<std::ptrdiff_t>(stride);
    fits = std::is_sorted(begin, end) && *(end - 1) <= static_cast<size_t>(data.numel());
    Row row;
    for (auto bound = begin; fits && bound + 1 != end; ++bound) {
      row.push_back(data.slice(0, static_cast<int64_t>(*bound), static_cast<int64_t>(*(bound + 1))));
    }
    rows.push_back(std::move(row));
  }
  if (fits) return rows;
  throw Refused(where + " was given a partition of " + std::to_string(partition.size()) +
                    " offsets that does not fit " + std::to_string(data.numel()) + " elements.",
                "Rows of " + std::to_string(stride) + " ascending offsets inside the data are expected.",
                "Give each row one offset more than there are ranks.");
}

WorkPtr reduce_rows(c10d::Backend& backend, const at::Tensor& data, std::vector<Row> rows) {
  return for_each_row(backend, data, std::move(rows), [&](at::Tensor& mine, at::Tensor& all, const Row& row) {
    if (is_even(row)) return backend._reduce_scatter_base(mine, all);
    std::vector<at::Tensor> outputs{mine};
    std::vector<Row> inputs{row};
    return backend.reduce_scatter(outputs, inputs);
  });
}

WorkPtr share_rows(c10d::Backend& backend, const at::Tensor& data, std::vector<Row> rows) {
  return for_each_row(backend, data, std::move(rows), [&](at::Tensor& mine, at::Tensor& all, const Row& row) {
    if (is_even(row)) return backend._allgather_base(all, mine);
    std::vector<at::Tensor> inputs{mine};
    std::vector<Row> outputs{row};
    return backend.allgather(outputs, inputs);
  });
}

}  // namespace mlsys::binding
