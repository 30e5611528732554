// Where in the Python program an operation was called, for the recorder and for mismatches.
#pragma once

#include <string>
#include <vector>

#include "comm/recorder/recorder.h"

namespace mlsys::binding {

// The calling thread's Python frames, innermost first, at most 32; none on threads that run no Python. Takes
// the GIL if the caller does not have it.
std::vector<comm::Frame> python_frames();

// "train.py:12 in main": the innermost frame outside torch's and our own communication code; empty when there
// is none.
std::string call_site(const std::vector<comm::Frame>& frames);

}  // namespace mlsys::binding
