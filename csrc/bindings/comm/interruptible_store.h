#pragma once

#include "comm/communicator.h"

namespace mlsys::binding {

// A store that can be told to give up waiting, so that leaving a group never hangs on a key.
class InterruptibleStore : public comm::Store {
 public:
  virtual void interrupt() = 0;
  // Goes over a connection of its own from here on, which takes at most `timeout` to open: a wait elsewhere
  // in the program may hold the shared one's lock. Throws when the store is gone.
  virtual void separate(std::chrono::milliseconds timeout) = 0;
};

}  // namespace mlsys::binding
