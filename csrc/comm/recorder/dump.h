// The recorder's content as a file that torch's flight-recorder tools read.
#pragma once

#include <string>

#include "comm/recorder/recorder.h"

namespace mlsys::comm {

constexpr const char* kDumpPrefix = "hang_rank_";  // then the global rank: what fr_trace infers ranks from

// The pickled dictionary of c10d's schema 2.10, and under "mlsys" what that has no place for.
std::string dump_bytes(const Recorder& recorder, int global_rank, const std::string& reason);

// Writes it to DIR/hang_rank_<global rank>, making DIR if need be; a reader sees the old file or the whole
// new one. Returns the path. Throws std::system_error.
std::string write_dump(const Recorder& recorder, const std::string& dir, int global_rank,
                       const std::string& reason);

}  // namespace mlsys::comm
