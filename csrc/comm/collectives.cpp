// The collectives of the Communicator: argument checks, the group of one, and which algorithm runs.
#include <stdexcept>

#include "comm/algorithms/hosts.h"
#include "comm/algorithms/local.h"
#include "comm/engine.h"
#include "core/dtype.h"

namespace mlsys::comm {
namespace {

std::span<const std::byte> bytes_at(const void* data, size_t bytes) {
  return {static_cast<const std::byte*>(data), bytes};
}

bool contiguous(std::span<const void* const> parts, size_t bytes) {
  for (size_t i = 1; i < parts.size(); ++i) {
    if (parts[i] != at(parts[0], i * bytes)) return false;
  }
  return true;
}

}  // namespace

void Engine::expect_entries(size_t given, int expected, const char* what) {
  if (given == static_cast<size_t>(expected)) return;
  throw std::invalid_argument(std::to_string(given) + " " + what + " were given; expected " +
                              std::to_string(expected) + ", one for each rank of the group.");
}

Context Engine::begin_reduction(OpKind kind, const void* data, size_t count, const Reduction& reduction,
                                Timeout timeout) {
  const size_t bytes = count * size_of(static_cast<DType>(reduction.dtype));
  Descriptor call = new_reduction(kind, count, -1, reduction);
  call.arena_offset = offset_of(data, bytes);
  return begin(call, timeout, bytes_at(data, bytes));
}

Context Engine::begin_scatter(OpKind kind, std::span<const void* const> inputs, size_t count,
                              const Reduction& reduction, Timeout timeout) {
  const size_t bytes = count * size_of(static_cast<DType>(reduction.dtype));
  Descriptor call = new_reduction(kind, count, -1, reduction);
  if (contiguous(inputs, bytes)) call.arena_offset = offset_of(inputs[0], bytes * inputs.size());
  return begin(call, timeout, {});
}

void Engine::all_reduce(void* data, size_t count, Reduction reduction, Timeout timeout) {
  const std::lock_guard lock(running_);
  expect_open();
  const Reducer reducer(reduction, options_.size);
  if (options_.size == 1) {
    begin_alone();
    return reducer.reduce(std::array<const void*, 1>{data}, std::array{data}, count);
  }
  Context context = begin_reduction(OpKind::kAllReduce, data, count, reduction, timeout);
  if (context.mesh == nullptr) return local_reduce(context, reducer, data, count, -1);
  hosts_reduce(context, reducer, data, count, -1);
  end(context);
}

void Engine::reduce(void* data, size_t count, Reduction reduction, int root, Timeout timeout) {
  const std::lock_guard lock(running_);
  expect_open();
  check_rank(root, "root");
  const Reducer reducer(reduction, options_.size);
  if (options_.size == 1) {
    begin_alone();
    return reducer.reduce(std::array<const void*, 1>{data}, std::array{data}, count);
  }
  const size_t bytes = count * reducer.element_bytes();
  Descriptor call = new_reduction(OpKind::kReduce, count, root, reduction);
  call.arena_offset = offset_of(data, bytes);
  Context context = begin(call, timeout, bytes_at(data, bytes));
  if (context.mesh == nullptr) return local_reduce(context, reducer, data, count, root);
  hosts_reduce(context, reducer, data, count, root);
  end(context);
}

void Engine::all_gather(const void* input, std::span<void* const> outputs, size_t bytes, Timeout timeout) {
  const std::lock_guard lock(running_);
  expect_open();
  expect_entries(outputs.size(), options_.size, "outputs");
  if (options_.size == 1) {
    begin_alone();
    return copy_bytes(outputs[0], input, bytes);
  }
  Descriptor call = new_call(OpKind::kAllGather, bytes, -1);
  call.arena_offset = offset_of(input, bytes);
  Context context = begin(call, timeout, bytes_at(input, bytes));
  if (context.mesh == nullptr) return local_share(context, input, outputs, bytes, -1);
  hosts_all_gather(context, input, outputs, bytes);
  end(context);
}

void Engine::reduce_scatter(std::span<const void* const> inputs, void* output, size_t count,
                            Reduction reduction, Timeout timeout) {
  const std::lock_guard lock(running_);
  expect_open();
  expect_entries(inputs.size(), options_.size, "inputs");
  const Reducer reducer(reduction, options_.size);
  if (options_.size == 1) {
    begin_alone();
    return reducer.reduce(inputs, std::array{output}, count);
  }
  Context context = begin_scatter(OpKind::kReduceScatter, inputs, count, reduction, timeout);
  if (context.mesh == nullptr) return local_reduce_scatter(context, reducer, inputs, output, count);
  hosts_reduce_scatter(context, reducer, inputs, output, count);
  end(context);
}

void Engine::broadcast(void* data, size_t bytes, int root, Timeout timeout) {
  const std::lock_guard lock(running_);
  expect_open();
  check_rank(root, "root");
  if (options_.size == 1) return begin_alone();
  Descriptor call = new_call(OpKind::kBroadcast, bytes, root);
  const bool sending = options_.rank == root;
  if (sending) call.arena_offset = offset_of(data, bytes);
  Context context = begin(call, timeout, sending ? bytes_at(data, bytes) : std::span<const std::byte>());
  if (context.mesh != nullptr) {
    hosts_broadcast(context, data, bytes, root);
    return end(context);
  }
  std::vector<void*> outputs(static_cast<size_t>(options_.size), nullptr);
  outputs[static_cast<size_t>(root)] = data;
  local_share(context, data, outputs, bytes, root);
}

void Engine::gather(const void* input, std::span<void* const> outputs, size_t bytes, int root,
                    Timeout timeout) {
  const std::lock_guard lock(running_);
  expect_open();
  check_rank(root, "root");
  expect_entries(outputs.size(), options_.rank == root ? options_.size : 0, "outputs");
  if (options_.size == 1) {
    begin_alone();
    return copy_bytes(outputs[0], input, bytes);
  }
  Descriptor call = new_call(OpKind::kGather, bytes, root);
  call.arena_offset = offset_of(input, bytes);
  Context context = begin(call, timeout, bytes_at(input, bytes));
  if (context.mesh != nullptr) {
    hosts_gather(context, input, outputs, bytes, root);
    return end(context);
  }
  const std::vector<void*> nothing(static_cast<size_t>(options_.size), nullptr);
  local_share(context, input, options_.rank == root ? outputs : std::span<void* const>(nothing), bytes, -1);
}

void Engine::scatter(std::span<const void* const> inputs, void* output, size_t bytes, int root,
                     Timeout timeout) {
  const std::lock_guard lock(running_);
  expect_open();
  check_rank(root, "root");
  const bool sending = options_.rank == root;
  expect_entries(inputs.size(), sending ? options_.size : 0, "inputs");
  if (options_.size == 1) {
    begin_alone();
    return copy_bytes(output, inputs[0], bytes);
  }
  const std::vector<ExchangeEntry> entries = exchange_entries([&](int rank) -> std::span<const std::byte> {
    return sending ? bytes_at(inputs[static_cast<size_t>(rank)], bytes) : std::span<const std::byte>();
  });
  Context context =
      begin(new_call(OpKind::kScatter, bytes, root), timeout, std::as_bytes(std::span(entries)));
  if (context.mesh != nullptr) {
    hosts_scatter(context, inputs, output, bytes, root);
    return end(context);
  }
  const auto size = static_cast<size_t>(options_.size);
  const std::vector<const void*> nothing(size, nullptr);
  std::vector<size_t> send_bytes(size, sending ? bytes : 0), receive_bytes(size, 0);
  std::vector<void*> outputs(size, nullptr);
  receive_bytes[static_cast<size_t>(root)] = bytes;
  outputs[static_cast<size_t>(root)] = output;
  local_exchange(context, sending ? inputs : std::span<const void* const>(nothing), send_bytes, outputs,
                 receive_bytes);
}

void Engine::all_to_all(std::span<const void* const> inputs, std::span<const size_t> send_bytes,
                        std::span<void* const> outputs, std::span<const size_t> recv_bytes, Timeout timeout) {
  const std::lock_guard lock(running_);
  expect_open();
  expect_entries(inputs.size(), options_.size, "inputs");
  expect_entries(send_bytes.size(), options_.size, "send sizes");
  expect_entries(outputs.size(), options_.size, "outputs");
  expect_entries(recv_bytes.size(), options_.size, "receive sizes");
  if (send_bytes[static_cast<size_t>(options_.rank)] != recv_bytes[static_cast<size_t>(options_.rank)]) {
    throw Mismatch(describe_size_mismatch(options_.rank, send_bytes[static_cast<size_t>(options_.rank)],
                                          options_.rank, recv_bytes[static_cast<size_t>(options_.rank)]));
  }
  if (options_.size == 1) {
    begin_alone();
    return copy_bytes(outputs[0], inputs[0], send_bytes[0]);
  }
  const std::vector<ExchangeEntry> entries = exchange_entries([&](int rank) {
    return bytes_at(inputs[static_cast<size_t>(rank)], send_bytes[static_cast<size_t>(rank)]);
  });
  Context context = begin(new_call(OpKind::kAllToAll, 0, -1), timeout, std::as_bytes(std::span(entries)));
  if (context.mesh != nullptr) {
    hosts_all_to_all(context, inputs, send_bytes, outputs, recv_bytes);
    return end(context);
  }
  local_exchange(context, inputs, send_bytes, outputs, recv_bytes);
}

// Inside a host the arrival is the barrier.
void Engine::barrier(Timeout timeout) {
  const std::lock_guard lock(running_);
  expect_open();
  if (options_.size == 1) return begin_alone();
  meet(OpKind::kBarrier, timeout);
}

// Ends with a meeting, so that nobody leaves, and takes the store along, while others still connect.
void Engine::connect(Timeout timeout) {
  const std::lock_guard lock(running_);
  expect_open();
  if (options_.size > 1) meet(OpKind::kConnecting, timeout);
}

void Engine::meet(OpKind kind, Timeout timeout) {
  Context context = begin(new_call(kind, 0, -1), timeout, {});
  if (context.mesh == nullptr) return;
  hosts_barrier(context);
  end(context);
}

void Engine::begin_alone() {
  sequence_.fetch_add(1, std::memory_order_relaxed);
  live_.operations.fetch_add(1, std::memory_order_relaxed);
}

std::vector<ExchangeEntry> Engine::exchange_entries(
    const std::function<std::span<const std::byte>(int)>& piece_for) {
  std::vector<ExchangeEntry> entries;
  for (const int rank : links().topology.local_ranks()) {
    const std::span<const std::byte> piece = piece_for(rank);
    entries.push_back(
        {piece.size(), piece.empty() ? Descriptor::kNoOffset : offset_of(piece.data(), piece.size())});
  }
  if (entries.size() * sizeof(ExchangeEntry) > RankSlot::kInlineBytes) {
    throw std::invalid_argument("all_to_all and scatter serve at most " +
                                std::to_string(RankSlot::kInlineBytes / sizeof(ExchangeEntry)) +
                                " ranks on one host; there are " + std::to_string(entries.size()) + ".");
  }
  return entries;
}

}  // namespace mlsys::comm
