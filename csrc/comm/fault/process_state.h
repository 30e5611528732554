// What the kernel says about another process of this host.
#pragma once

namespace mlsys::comm {

// Whether the process behind a pidfd is stopped (SIGSTOP, or a debugger). False when that cannot be known.
bool is_stopped(int pidfd);

}  // namespace mlsys::comm
