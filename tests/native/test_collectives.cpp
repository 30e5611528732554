// Every collective on every topology, with private and with arena memory, against a reference in plain
// integers or doubles. Values are small integers, so that sums are exact in every type and order.
#include <cstring>
#include <numeric>

#include "check.h"
#include "ranks.h"

namespace {

using mlsys::comm::ElementType;
using mlsys::comm::ReduceOp;
using mlsys::comm::Reduction;
using ranks::Rank;

constexpr std::chrono::milliseconds kDefault{0};
// Zero, one, fewer than ranks, odd, beyond the payload beside the descriptor, beyond the longer one, beyond
// all slots of a ring, and not a multiple of anything.
const std::vector<size_t> kCounts{0, 1, 3, 7, 1000, 5003, 70001, 400009};

// Memory of the caller's choice; `shift` elements make private memory unaligned for vectors.
std::shared_ptr<float> floats(Rank& r, size_t count, bool arena) {
  if (arena) return std::static_pointer_cast<float>(r.comm->allocate(count * sizeof(float)));
  auto whole = std::shared_ptr<float[]>(new float[count + 1]);
  return std::shared_ptr<float>(whole, whole.get() + 1);
}

float value(int rank, size_t index) {
  return static_cast<float>((index * 7 + static_cast<size_t>(rank) * 13) % 101) - 50.0F;
}

float sum_at(int size, size_t index) {
  float sum = 0;
  for (int rank = 0; rank < size; ++rank) sum += value(rank, index);
  return sum;
}

void fill(float* data, int rank, size_t count, size_t first = 0) {
  for (size_t i = 0; i < count; ++i) data[i] = value(rank, first + i);
}

template <class Body>
void everywhere(Body body) {
  for (const ranks::Job& job : ranks::topologies()) {
    ranks::run(job, [&](Rank& r) {
      for (const size_t count : kCounts) {
        body(r, count, false);
        body(r, count, true);
        if (count > 1000) body(r, count, r.rank % 2 == 0);  // shorter ones travel with the descriptor
      }
    });
  }
}

const Reduction kSum{ElementType::kFloat32};

}  // namespace

TEST(all_reduce_matches_the_sum_on_every_topology) {
  everywhere([](Rank& r, size_t count, bool arena) {
    const auto data = floats(r, count, arena);
    fill(data.get(), r.rank, count);
    r.comm->all_reduce(data.get(), count, kSum, kDefault);
    for (size_t i = 0; i < count; ++i) CHECK_EQUAL(data.get()[i], sum_at(r.size, i));
  });
}

TEST(reduce_writes_the_sum_on_the_root_alone) {
  everywhere([](Rank& r, size_t count, bool arena) {
    const int root = r.size - 1;
    const auto data = floats(r, count, arena);
    fill(data.get(), r.rank, count);
    r.comm->reduce(data.get(), count, kSum, root, kDefault);
    for (size_t i = 0; i < count; ++i) {
      CHECK_EQUAL(data.get()[i], r.rank == root ? sum_at(r.size, i) : value(r.rank, i));
    }
  });
}

TEST(all_gather_brings_every_input_to_every_rank) {
  everywhere([](Rank& r, size_t count, bool arena) {
    const auto input = floats(r, count, arena);
    fill(input.get(), r.rank, count);
    const auto output = floats(r, count * static_cast<size_t>(r.size), arena);
    std::vector<void*> outputs;
    for (int rank = 0; rank < r.size; ++rank)
      outputs.push_back(output.get() + static_cast<size_t>(rank) * count);
    r.comm->all_gather(input.get(), outputs, count * sizeof(float), kDefault);
    for (int rank = 0; rank < r.size; ++rank) {
      for (size_t i = 0; i < count; ++i)
        CHECK_EQUAL(static_cast<float*>(outputs[static_cast<size_t>(rank)])[i], value(rank, i));
    }
  });
}

TEST(all_gather_works_in_place) {
  everywhere([](Rank& r, size_t count, bool arena) {
    const auto output = floats(r, count * static_cast<size_t>(r.size), arena);
    std::vector<void*> outputs;
    for (int rank = 0; rank < r.size; ++rank)
      outputs.push_back(output.get() + static_cast<size_t>(rank) * count);
    auto* mine = static_cast<float*>(outputs[static_cast<size_t>(r.rank)]);
    fill(mine, r.rank, count);
    r.comm->all_gather(mine, outputs, count * sizeof(float), kDefault);
    for (int rank = 0; rank < r.size; ++rank) {
      for (size_t i = 0; i < count; ++i)
        CHECK_EQUAL(static_cast<float*>(outputs[static_cast<size_t>(rank)])[i], value(rank, i));
    }
  });
}

TEST(reduce_scatter_gives_each_rank_the_sum_of_its_part) {
  everywhere([](Rank& r, size_t count, bool arena) {
    const auto input = floats(r, count * static_cast<size_t>(r.size), arena);
    fill(input.get(), r.rank, count * static_cast<size_t>(r.size));
    const auto output = floats(r, count, arena);
    std::vector<const void*> inputs;
    for (int rank = 0; rank < r.size; ++rank)
      inputs.push_back(input.get() + static_cast<size_t>(rank) * count);
    r.comm->reduce_scatter(inputs, output.get(), count, kSum, kDefault);
    for (size_t i = 0; i < count; ++i) {
      CHECK_EQUAL(output.get()[i], sum_at(r.size, static_cast<size_t>(r.rank) * count + i));
    }
  });
}

TEST(broadcast_copies_from_any_root) {
  everywhere([](Rank& r, size_t count, bool arena) {
    for (int root = 0; root < r.size; ++root) {
      const auto data = floats(r, count, arena);
      fill(data.get(), r.rank, count);
      r.comm->broadcast(data.get(), count * sizeof(float), root, kDefault);
      for (size_t i = 0; i < count; ++i) CHECK_EQUAL(data.get()[i], value(root, i));
    }
  });
}

TEST(gather_collects_on_any_root) {
  everywhere([](Rank& r, size_t count, bool arena) {
    for (int root = 0; root < r.size; ++root) {
      const auto input = floats(r, count, arena);
      fill(input.get(), r.rank, count);
      const auto output = floats(r, count * static_cast<size_t>(r.size), arena);
      std::vector<void*> outputs;
      for (int rank = 0; rank < r.size && r.rank == root; ++rank) {
        outputs.push_back(output.get() + static_cast<size_t>(rank) * count);
      }
      r.comm->gather(input.get(), outputs, count * sizeof(float), root, kDefault);
      for (size_t rank = 0; rank < outputs.size(); ++rank) {
        for (size_t i = 0; i < count; ++i)
          CHECK_EQUAL(static_cast<float*>(outputs[rank])[i], value(static_cast<int>(rank), i));
      }
    }
  });
}

TEST(scatter_distributes_from_any_root) {
  everywhere([](Rank& r, size_t count, bool arena) {
    for (int root = 0; root < r.size; ++root) {
      const auto input = floats(r, count * static_cast<size_t>(r.size), arena);
      fill(input.get(), root, count * static_cast<size_t>(r.size));
      std::vector<const void*> inputs;
      for (int rank = 0; rank < r.size && r.rank == root; ++rank) {
        inputs.push_back(input.get() + static_cast<size_t>(rank) * count);
      }
      const auto output = floats(r, count, arena);
      r.comm->scatter(inputs, output.get(), count * sizeof(float), root, kDefault);
      for (size_t i = 0; i < count; ++i) {
        CHECK_EQUAL(output.get()[i], value(root, static_cast<size_t>(r.rank) * count + i));
      }
    }
  });
}

TEST(all_to_all_moves_pieces_of_different_sizes) {
  everywhere([](Rank& r, size_t count, bool arena) {
    // Rank a sends count * (a + b) % 3 elements to rank b: some pairs nothing, others twice as much.
    const auto elements = [&](int from, int to) { return count * static_cast<size_t>((from + to) % 3); };
    std::vector<std::shared_ptr<float>> owners;
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
    std::vector<size_t> sends, receives;
    for (int other = 0; other < r.size; ++other) {
      owners.push_back(floats(r, elements(r.rank, other), arena));
      fill(owners.back().get(), r.rank * 10 + other, elements(r.rank, other));
      inputs.push_back(owners.back().get());
      sends.push_back(elements(r.rank, other) * sizeof(float));
      owners.push_back(floats(r, elements(other, r.rank), arena));
      outputs.push_back(owners.back().get());
      receives.push_back(elements(other, r.rank) * sizeof(float));
    }
    r.comm->all_to_all(inputs, sends, outputs, receives, kDefault);
    for (int other = 0; other < r.size; ++other) {
      const auto* got = static_cast<const float*>(outputs[static_cast<size_t>(other)]);
      for (size_t i = 0; i < elements(other, r.rank); ++i) CHECK_EQUAL(got[i], value(other * 10 + r.rank, i));
    }
  });
}

TEST(barrier_holds_everyone_until_the_last_has_come) {
  for (const ranks::Job& job : ranks::topologies()) {
    ranks::run(job, [](Rank& r) {
      for (int round = 0; round < 20; ++round) {
        ranks::post(r, "arrived-" + std::to_string(round) + "-" + std::to_string(r.rank), "x");
        r.comm->barrier(kDefault);
        for (int rank = 0; rank < r.size; ++rank) {
          // Already there: a single look, no waiting.
          const std::string path =
              r.folder + "/post-arrived-" + std::to_string(round) + "-" + std::to_string(rank);
          FILE* file = std::fopen(path.c_str(), "r");
          CHECK(file != nullptr);
          std::fclose(file);
        }
      }
    });
  }
}
