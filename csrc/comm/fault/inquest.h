// Who is to blame for an operation that timed out: what each rank was found doing, and the words for it.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "comm/operation.h"
#include "comm/topology.h"

namespace mlsys::comm {

// One rank as it was found.
struct Standing {
  enum class State : uint32_t { kSilent, kStopped, kAlive };
  State state = State::kSilent;  // of the process; silent: nobody on its host answered
  Descriptor last;               // the last collective that it began, unless silent
};

struct Verdict {
  int culprit = -1;          // group rank
  bool unreachable = false;  // its process is stopped, or nothing was heard of it
  std::string findings;      // " Stopped: rank 1 last called X. Arrived: ..."
};

// `standings` has one entry for each rank of the group, or none when nobody could be asked; `awaited` are the
// ranks that the caller waited for in `op`. Blames, in this order, a rank whose process is stopped, one that
// has not begun the operation (a collective), one of which nothing was heard, the first awaited one.
Verdict judge(const Topology& topology, std::span<const Standing> standings, std::span<const int> awaited,
              const Descriptor& op);

}  // namespace mlsys::comm
