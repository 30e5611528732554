// Reductions over several hosts in the order of one canonical tree over the ranks, whichever hosts they are
// on.
//
// The tree over ranks [first, last) is the rank itself, or the tree over the largest power of two of them
// that is smaller than their number, combined with the tree over the rest: what a binary counter does, and
// what Reducer does inside a host. A host sends the owner of a slice one partial for every largest subtree
// that it holds whole; the owner combines partials as the tree says. Where hosts hold aligned runs of 2^k
// ranks that is one partial each, and the volume that of reduce-scatter + all-gather; where the ranks of
// hosts alternate it is up to one for each rank.
#include <bit>

#include "comm/algorithms/hosts.h"
#include "comm/algorithms/hosts_owned.h"

namespace mlsys::comm {
namespace {

constexpr size_t kSweep = 2048;     // elements: a level of the tree in the first-level cache
constexpr size_t kMostLevels = 33;  // of a tree over any int of ranks

struct Node {
  int first;
  int last;  // one past
  int split() const {
    return first + static_cast<int>(std::bit_ceil(static_cast<unsigned>(last - first)) / 2);
  }
  bool operator==(const Node&) const = default;
};

// The largest subtrees of `node` that lie on one host each, with that host, from left to right.
void find_whole(const Topology& topology, Node node, std::vector<std::pair<Node, int>>& found) {
  const int host = topology.host_of[static_cast<size_t>(node.first)];
  bool whole = true;
  for (int rank = node.first; rank < node.last; ++rank) {
    whole &= topology.host_of[static_cast<size_t>(rank)] == host;
  }
  if (whole) {
    found.emplace_back(node, host);
    return;
  }
  find_whole(topology, {node.first, node.split()}, found);
  find_whole(topology, {node.split(), node.last}, found);
}

class Tree final : public OwnerProtocol {
 public:
  Tree(const Topology& topology, const Reducer& reducer)
      : topology_(topology), reducer_(reducer), counts_(static_cast<size_t>(topology.num_hosts()), 0) {
    std::vector<std::pair<Node, int>> found;
    find_whole(topology, {0, topology.size}, found);
    for (const auto& [node, host] : found) {
      whole_.push_back({node, host, counts_[static_cast<size_t>(host)]++});
    }
  }

  size_t message_bytes(int host, size_t count) const override {
    return counts_[static_cast<size_t>(host)] * partial_bytes(count);
  }
  size_t result_bytes(size_t count) const override { return count * reducer_.element_bytes(); }

  void contribute(const OwnedPart& part, std::span<const void* const> sources,
                  std::byte* message) const override {
    for (const Whole& whole : whole_) {
      if (whole.host != topology_.my_host()) continue;
      std::byte* target = message + partial_bytes(whole.position * part.tile + part.first);
      reducer_.reduce_to_partial(sources_of(whole.node, sources, 0), target, part.count);
    }
  }

  void combine(const OwnedPart& part, std::span<const void* const> sources,
               std::span<const std::byte* const> messages, std::byte* result) const override {
    Walk walk{*this, part, sources, messages};
    for (size_t done = 0; done < part.count; done += kSweep) {
      walk.done = done;
      walk.count = std::min(kSweep, part.count - done);
      size_t next = 0;
      const void* total = walk.evaluate({0, topology_.size}, 0, next);
      reducer_.finish(total, result + (part.first + done) * reducer_.element_bytes(), walk.count);
    }
  }

  void deliver(const std::byte* result, std::byte* elements, size_t count) const override {
    copy_bytes(elements, result, result_bytes(count));
  }

 private:
  struct Whole {
    Node node;
    int host;
    size_t position;  // among its host's
  };

  // One sweep of an owner up the tree. Level d of `levels` belongs to the node at depth d under evaluation.
  struct Walk {
    const Tree& tree;
    const OwnedPart& part;
    std::span<const void* const> sources;
    std::span<const std::byte* const> messages;
    size_t done = 0;
    size_t count = 0;
    std::vector<std::byte> levels = std::vector<std::byte>(kMostLevels * kSweep * sizeof(double));

    // `next` counts the whole subtrees, which are met from left to right.
    const void* evaluate(Node node, size_t depth, size_t& next) {
      std::byte* target = levels.data() + depth * kSweep * sizeof(double);
      const Whole& whole = tree.whole_[next];
      if (whole.node == node) {
        ++next;
        const std::byte* message = messages[static_cast<size_t>(whole.host)];
        if (message != nullptr) {
          return message + tree.partial_bytes(whole.position * part.tile + part.first + done);
        }
        tree.reducer_.reduce_to_partial(tree.sources_of(node, sources, done * tree.reducer_.element_bytes()),
                                        target, count);
        return target;
      }
      const void* left = evaluate({node.first, node.split()}, depth, next);
      const void* right = evaluate({node.split(), node.last}, depth + 1, next);
      tree.reducer_.merge(left, right, target, count);
      return target;
    }
  };

  size_t partial_bytes(size_t count) const { return count * reducer_.partial_bytes(); }

  // Of the ranks of `node`, all on this host, from the sources of the host's ranks.
  std::vector<const void*> sources_of(Node node, std::span<const void* const> sources, size_t offset) const {
    std::vector<const void*> chosen;
    for (int rank = node.first; rank < node.last; ++rank) {
      chosen.push_back(
          at(sources[static_cast<size_t>(topology_.local_of[static_cast<size_t>(rank)])], offset));
    }
    return chosen;
  }

  const Topology& topology_;
  const Reducer& reducer_;
  std::vector<size_t> counts_;
  std::vector<Whole> whole_;
};

}  // namespace

void hosts_reduce_tree(Context& context, const Reducer& reducer, void* data, size_t count) {
  reduce_by_owners(context, Tree(context.topology, reducer),
                   owned_by_hosts(context.topology, data, count, reducer.element_bytes()));
}

void hosts_reduce_scatter_tree(Context& context, const Reducer& reducer, std::span<const void* const> inputs,
                               void* output, size_t count) {
  const Topology& topology = context.topology;
  OwnedReduction reduction;
  reduction.element_bytes = reducer.element_bytes();
  reduction.num_elements = count * inputs.size();
  reduction.output = static_cast<std::byte*>(output);
  reduction.shares_results = false;
  for (size_t rank = 0; rank < inputs.size(); ++rank) {
    reduction.slices.push_back({static_cast<const std::byte*>(inputs[rank]), count, rank * count,
                                topology.host_of[rank], topology.local_of[rank]});
  }
  reduce_by_owners(context, Tree(topology, reducer), reduction);
}

}  // namespace mlsys::comm
