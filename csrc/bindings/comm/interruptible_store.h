#pragma once

#include "comm/communicator.h"

namespace mlsys::binding {

// A store that can be told to give up waiting, so that leaving a group never hangs on a key.
class InterruptibleStore : public comm::Store {
 public:
  virtual void interrupt() = 0;
};

}  // namespace mlsys::binding
