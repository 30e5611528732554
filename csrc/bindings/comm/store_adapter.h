// The rendezvous of the core on top of torch's c10d::Store.
#pragma once

#include <memory>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "bindings/comm/interruptible_store.h"

namespace mlsys::binding {

// Uses the connection of `store`, and never waits in it. A connection of its own would not be opened for half
// an hour when the rank that serves the store has just died; the existing one fails at once.
std::shared_ptr<InterruptibleStore> adapt_store(c10::intrusive_ptr<c10d::Store> store);

}  // namespace mlsys::binding
