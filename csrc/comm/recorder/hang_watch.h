// Writes this rank's dump when something is wrong: here, when asked by SIGUSR2, and when another rank of this
// machine has dumped into the same folder, so that one rank's failure gathers the state of all.
//
// One thread of its own, started with the first operation and only when a folder is named, needs neither
// Python's lock nor any rank's co-operation: a hung interpreter is what it is for.
#pragma once

#include <string>

#include "comm/recorder/recorder.h"

namespace mlsys::comm {

// Starts the thread unless it runs already. Without a folder it does nothing. Sets a handler of SIGUSR2 where
// the program has none.
void start_hang_watch(Recorder& recorder);

// Writes the dump of a failure; at most once a second, since one failure fails many operations. Never throws:
// a dump that cannot be written must not hide what failed.
void dump_failure(Recorder& recorder, const std::string& reason) noexcept;

}  // namespace mlsys::comm
