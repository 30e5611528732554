// The rendezvous of the core on top of torch's c10d::Store.
#pragma once

#include <memory>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "bindings/comm/interruptible_store.h"

namespace mlsys::binding {

// `store` is not used before the first operation, and then through a clone with its own connection: a wait
// here must not hold the lock that the main thread's use of the same store would need.
std::shared_ptr<InterruptibleStore> adapt_store(c10::intrusive_ptr<c10d::Store> store);

}  // namespace mlsys::binding
