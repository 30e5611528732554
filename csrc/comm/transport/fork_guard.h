// Sockets that a forked child must not keep open.
//
// A data-loader worker forked from a rank inherits its descriptors. If the rank is then killed, the worker's
// copies would keep the connections alive and no peer would notice the death. So every guarded descriptor is
// replaced by /dev/null in forked children (replaced, not closed, so that its number is not reused under its
// owner).
#pragma once

namespace mlsys::comm {

void guard_from_children(int fd);
void stop_guarding(int fd);

}  // namespace mlsys::comm
