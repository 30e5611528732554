// The MPI job that mpi4py is in, as our own code uses it: functions of the library that mpi4py has loaded,
// found at run time, so that no MPI is needed to build.
//
// Only functions and two handles are taken over, and no constant, because the handles' type is all that
// differs between implementations: Open MPI's and the standard ABI's are pointers, those of MPICH and its
// relatives are ints. MPI_SUCCESS is 0 everywhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace mlsys::binding {

// What mpi4py tells of the job and, from `ranks` on, what the members of a group have agreed on.
struct MpiJob {
  std::string extension;      // the file of mpi4py.MPI, which is linked with the library
  int handle_bytes = 0;       // 4 or 8
  uint64_t communicator = 0;  // handles; the communicator is our own duplicate, which returns errors
  uint64_t byte_type = 0;
  std::vector<int> ranks;  // in the communicator, by group rank
  int first_tag = 0;       // of kNumTags, which no other group of these ranks uses

  static constexpr int kMostLanes = 16;
  static constexpr int kNumTags = kMostLanes + 1;  // the last one is for messages
};

// A status is larger nowhere (32 bytes in the standard ABI).
struct alignas(16) MpiStatus {
  std::byte bytes[128];
};

template <class Handle>  // int or void*
struct MpiFunctions {
  int (*isend)(const void*, int count, Handle type, int destination, int tag, Handle communicator, Handle*);
  int (*irecv)(void*, int count, Handle type, int source, int tag, Handle communicator, Handle*);
  int (*test)(Handle*, int* done, MpiStatus*);
  int (*cancel)(Handle*);
  int (*finalized)(int*);
  int (*error_string)(int, char*, int* length);
};

// Throws Refused when the library lacks one.
template <class Handle>
MpiFunctions<Handle> find_mpi_functions(const std::string& extension);

// A carrier between the ranks of a group, for collectives with `num_lanes` lanes. Throws Refused when the
// library cannot be used.
std::shared_ptr<comm::Carrier> make_mpi_carrier(const MpiJob& job, comm::CarrierUse use, int num_lanes);

}  // namespace mlsys::binding
