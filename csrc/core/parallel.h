// How a kernel spreads tasks over threads without knowing whose threads they are.
//
// The binding passes torch's own pool (torch.set_num_threads is respected, and with one thread no parallel
// region is opened, so a later fork is safe); C++ tests pass run_inline. The split into [begin, end) ranges
// is the pool's business: kernels must give the same bits for every split.
#pragma once

#include <cstdint>
#include <type_traits>

namespace mlsys {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
// Calls body on disjoint ranges that cover [0, num_tasks); at least `grain` tasks a range where there are so
// many.
using ParallelFor = void (*)(int64_t num_tasks, int64_t grain, ParallelBody body, void* context);

inline void run_inline(int64_t num_tasks, int64_t, ParallelBody body, void* context) {
  if (num_tasks > 0) body(0, num_tasks, context);
}

template <class Body>
void parallel_for(ParallelFor pool, int64_t num_tasks, int64_t grain, Body&& body) {
  pool(
      num_tasks, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end);
      },
      static_cast<void*>(&body));
}

}  // namespace mlsys
