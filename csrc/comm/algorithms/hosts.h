// Collectives over several hosts: shared memory inside each, TCP between them. All are called after
// await_arrival(), with connections open.
//
// The large ones keep every local rank on the wire with a share of its own (hosts_plan.h) and overlap shared
// memory with it (hosts_pipeline.h). What travels lies in the host's scratch area, which all its ranks can
// reach; where a host has one rank it lies in the caller's memory if it can.
#pragma once

#include <span>
#include <vector>

#include "comm/algorithms/context.h"

namespace mlsys::comm {

// root (group rank) >= 0: only its `data` is written.
void hosts_reduce(Context& context, const Reducer& reducer, void* data, size_t count, int root);
void hosts_reduce_scatter(Context& context, const Reducer& reducer, std::span<const void* const> inputs,
                          void* output, size_t count);
// In the order of the canonical tree over ranks: hosts_tree.cpp.
void hosts_reduce_tree(Context& context, const Reducer& reducer, void* data, size_t count);
void hosts_reduce_scatter_tree(Context& context, const Reducer& reducer, std::span<const void* const> inputs,
                               void* output, size_t count);
// Sum / divisor, encoded between hosts; `residual` may be null: hosts_compressed.cpp.
void hosts_reduce_compressed(Context& context, Compression compression, float divisor, float* data,
                             size_t count, float* residual);
void hosts_all_gather(Context& context, const void* input, std::span<void* const> outputs, size_t bytes);
void hosts_broadcast(Context& context, void* data, size_t bytes, int root);
void hosts_barrier(Context& context);
void hosts_gather(Context& context, const void* input, std::span<void* const> outputs, size_t bytes,
                  int root);
void hosts_scatter(Context& context, std::span<const void* const> inputs, void* output, size_t bytes,
                   int root);
void hosts_all_to_all(Context& context, std::span<const void* const> inputs,
                      std::span<const size_t> send_bytes, std::span<void* const> outputs,
                      std::span<const size_t> receive_bytes);

// The ranks that this rank talks to in the operation.
std::vector<int> tcp_peers(const Topology& topology, const Descriptor& call);
// Leaders of the next and the previous host, which compare their calls; empty on other ranks.
std::vector<int> ring_neighbours(const Topology& topology);

inline bool one_rank_each(const Topology& topology) { return topology.num_hosts() == topology.size; }

}  // namespace mlsys::comm
