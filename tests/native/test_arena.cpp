// The allocator and the life of shared memory.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>

#include "check.h"
#include "memory/arena.h"
#include "memory/limits.h"
#include "ranks.h"

namespace {

using mlsys::Arena;
using mlsys::ArenaFull;

bool all_zero(const void* data, size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(data);
  for (size_t i = 0; i < bytes; ++i) {
    if (p[i] != 0) return false;
  }
  return true;
}

}  // namespace

TEST(blocks_are_aligned_zeroed_and_apart) {
  const auto arena = std::make_shared<Arena>(1 << 20);
  std::mt19937 random(5);
  std::vector<std::pair<std::shared_ptr<void>, size_t>> blocks;
  for (int round = 0; round < 2000; ++round) {
    if (blocks.size() > 20) {
      const size_t victim = random() % blocks.size();
      blocks.erase(blocks.begin() + static_cast<ptrdiff_t>(victim));
    }
    const size_t bytes = random() % 9000;
    std::shared_ptr<void> block = arena->allocate(bytes);
    CHECK_EQUAL(reinterpret_cast<uintptr_t>(block.get()) % Arena::kAlignment, uintptr_t{0});
    CHECK(all_zero(block.get(), bytes));
    std::memset(block.get(), static_cast<int>(round % 255 + 1), bytes);
    for (const auto& [other, other_bytes] : blocks) {
      const auto* a = static_cast<const char*>(block.get());
      const auto* b = static_cast<const char*>(other.get());
      CHECK(a + bytes <= b || b + other_bytes <= a || bytes == 0 || other_bytes == 0);
    }
    blocks.emplace_back(block, bytes);
  }
  blocks.clear();
  CHECK_EQUAL(arena->bytes_in_use(), size_t{0});
  CHECK(arena->allocate((1 << 20) - 64) != nullptr);  // everything has been merged again
}

TEST(a_full_arena_says_what_to_do) {
  const auto arena = std::make_shared<Arena>(4096);
  const auto held = arena->allocate(3000);
  CHECK_THROWS(ArenaFull, arena->allocate(2000), "raise MLSYS_ARENA_MIB");
  CHECK_THROWS(std::bad_alloc, arena->allocate(~size_t{0}), "raise MLSYS_ARENA_MIB");
  CHECK(arena->allocate(1000) != nullptr);
}

TEST(memory_outlives_the_arena_and_the_communicator) {
  std::weak_ptr<Arena> watched;
  std::shared_ptr<void> block;
  {
    const auto arena = std::make_shared<Arena>(1 << 16);
    watched = arena;
    block = arena->allocate(100);
  }
  std::memset(block.get(), 1, 100);
  CHECK(!watched.expired());
  block.reset();
  CHECK(watched.expired());

  ranks::run({.size = 2}, [](ranks::Rank& r) {
    const auto tensor = std::static_pointer_cast<float>(r.comm->allocate(4000 * sizeof(float)));
    tensor.get()[0] = 1;
    CHECK(r.comm->in_arena(tensor.get(), 4000 * sizeof(float)));
    r.comm->all_reduce(tensor.get(), 4000, {mlsys::comm::ElementType::kFloat32}, {});
    CHECK_EQUAL(r.comm->counters().zero_copy_operations, uint64_t{1});
    r.comm.reset();
    CHECK_EQUAL(tensor.get()[0], 2.0F);
  });
}

TEST(offsets_are_of_whole_ranges_only) {
  const auto arena = std::make_shared<Arena>(4096);
  const auto* base = arena->base();
  CHECK_EQUAL(arena->offset_of(base + 10, 4086), uint64_t{10});
  CHECK_EQUAL(arena->offset_of(base + 10, 4087), Arena::kNoOffset);
  CHECK_EQUAL(arena->offset_of(base - 1, 1), Arena::kNoOffset);
  CHECK_EQUAL(arena->offset_of(base + 1, ~size_t{0}), Arena::kNoOffset);
  int local = 0;
  CHECK_EQUAL(arena->offset_of(&local, sizeof(local)), Arena::kNoOffset);
}

TEST(the_capacity_comes_from_the_environment) {
  ranks::run({.size = 1, .environment = {{"MLSYS_ARENA_MIB", "3"}}}, [](ranks::Rank& r) {
    CHECK(r.comm->allocate(2 << 20) != nullptr);
    CHECK_THROWS(std::bad_alloc, r.comm->allocate(4 << 20), "of 3145728");
  });
  ranks::run({.size = 1, .environment = {{"MLSYS_ARENA_MIB", "many"}}}, [](ranks::Rank& r) {
    CHECK_THROWS(std::invalid_argument, r.comm->allocate(1), "MLSYS_ARENA_MIB=many is no size");
  });
}

TEST(the_capacity_is_within_the_limits_of_all_control_groups_around_the_process) {
  std::string folder = (std::filesystem::temp_directory_path() / "mlsys-test-XXXXXX").string();
  CHECK(::mkdtemp(folder.data()) != nullptr);
  const std::filesystem::path mount = folder;
  const auto write = [&](const std::string& path, const std::string& text) {
    std::filesystem::create_directories((mount / path).parent_path());
    std::ofstream(mount / path) << text;
  };
  const size_t none = std::numeric_limits<size_t>::max();
  write("membership", "12:cpu,memory:/slurm/job\n1:name=systemd:/elsewhere\n0::/user/job\n");
  CHECK_EQUAL(mlsys::control_group_limit(mount / "absent", mount), none);
  CHECK_EQUAL(mlsys::control_group_limit(mount / "membership", mount), none);
  write("user/job/memory.max", "max\n");
  CHECK_EQUAL(mlsys::control_group_limit(mount / "membership", mount), none);
  write("user/memory.max", "3000000000\n");
  CHECK_EQUAL(mlsys::control_group_limit(mount / "membership", mount), size_t{3000000000});
  write("memory/slurm/job/memory.limit_in_bytes", "2000000000\n");
  CHECK_EQUAL(mlsys::control_group_limit(mount / "membership", mount), size_t{2000000000});
  write("memory.max", "1000000000\n");  // as a container sees its own group
  CHECK_EQUAL(mlsys::control_group_limit(mount / "absent", mount), size_t{1000000000});
  std::filesystem::remove_all(mount);
}
