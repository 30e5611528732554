// How much memory this process may hope to use.
#pragma once

#include <cstddef>

namespace mlsys {

// The smaller of the machine's memory and the limit of the control group this process runs in, in bytes.
size_t memory_limit();

}  // namespace mlsys
